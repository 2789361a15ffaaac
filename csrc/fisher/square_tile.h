// Products of a few rows with a few vectors of lanes, summed over positions in registers, and then
// squared.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/vector.h"

namespace fitcompress {

// Rows × Vectors elements a tile, as many as fit in registers.
template <int Lanes>
constexpr int kTileRows = Lanes == 16 ? 8 : 4;
template <int Lanes>
constexpr int kTileVectors = Lanes == 4 ? 2 : 3;

// One segment of each of `samples` samples, packed one after the other.
struct Packed {
  const float *input, *grad;
  int64_t input_size, grad_size;  // floats of a sample
  const int64_t* at;              // [positions] where each finds its input
  int64_t positions, samples;
  bool first, last;  // segment of the samples
};

// Where a tile leaves its sums over the positions so far, and the squares of these at the end.
struct Sums {
  float* products;  // elements, `stride` floats from row to row
  float* totals;    // the same; may be null
  double* norms;    // [samples, Lanes]; may be null
  int64_t stride;
};

template <int Lanes, int Rows, int Vectors>
struct Tile {
  using Vector = typename VectorOf<Lanes>::Type;

  Vector sum[Rows][Vectors];

  FITCOMPRESS_INLINE void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector{};
  }

  FITCOMPRESS_INLINE void add(const float* from, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] += *reinterpret_cast<const Vector*>(from + r * stride + v * Lanes);
      }
  }

  FITCOMPRESS_INLINE void store(float* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        *reinterpret_cast<Vector*>(to + r * stride + v * Lanes) = sum[r][v];
      }
  }

  // Lanes that are not used may hold NaN: of the last vectors, `used[v]` are.
  FITCOMPRESS_INLINE void square(const Sums& sums, int64_t sample, int64_t rows,
                                 const int64_t* used) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] *= sum[r][v];
    if (sums.totals != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          *reinterpret_cast<Vector*>(sums.totals + r * sums.stride + v * Lanes) += sum[r][v];
        }
    }
    if (sums.norms == nullptr) return;
    Vector norms[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) norms[v] = sum[0][v];
#pragma GCC unroll 8
    for (int r = 1; r < Rows; ++r) {
      if (r >= rows) break;
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) norms[v] += sum[r][v];
    }
    alignas(64) float norm[Lanes];
    double* const to = sums.norms + sample * Lanes;
    if (used[Vectors - 1] == Lanes && used[0] == Lanes) {
#pragma GCC unroll 16
      for (int v = 1; v < Vectors; ++v) norms[0] += norms[v];
      *reinterpret_cast<Vector*>(norm) = norms[0];
      for (int l = 0; l < Lanes; ++l) to[l] += norm[l];
      return;
    }
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      *reinterpret_cast<Vector*>(norm) = norms[v];
      for (int64_t l = 0; l < used[v]; ++l) to[l] += norm[l];
    }
  }

  FITCOMPRESS_INLINE void end(const Packed& packed, const Sums& sums, int64_t sample, int64_t rows,
                              const int64_t* used) {
    // Segments are summed on their own: a long sum rounds less in parts.
    if (!packed.first) add(sums.products, sums.stride);
    if (packed.last) {
      square(sums, sample, rows, used);
    } else {
      store(sums.products, sums.stride);
    }
  }
};

// Rows of the gradient's panel grad[p][PanelRows], of which `rows` are used, times vectors of the
// input at the offsets `vector`.
template <int Lanes, int Rows, int Vectors>
FITCOMPRESS_INLINE void multiply_tile(const Packed& packed, const float* grad,
                                      const int64_t* vector, const int64_t* used, int64_t rows,
                                      const Sums& sums) {
  using Vector = typename VectorOf<Lanes>::Type;
  constexpr int kPanel = kTileRows<Lanes>;
  const float* x[Vectors];
  for (int v = 0; v < Vectors; ++v) x[v] = packed.input + vector[v];
  for (int64_t sample = 0; sample < packed.samples; ++sample) {
    Tile<Lanes, Rows, Vectors> tile;
    tile.clear();
    const float* e = grad;
    for (int64_t p = 0; p < packed.positions; ++p, e += kPanel) {
      const int64_t at = packed.at[p];
      Vector column[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) column[v] = *reinterpret_cast<const Vector*>(x[v] + at);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tile.sum[r][v] += e[r] * column[v];
    }
    tile.end(packed, sums, sample, rows, used);
    grad += packed.grad_size;
    for (int v = 0; v < Vectors; ++v) x[v] += packed.input_size;
  }
}

// A vector of groups: the gradient of one output times the input at Offsets kernel offsets.
template <int Lanes, int Offsets>
FITCOMPRESS_INLINE void multiply_strip(const Packed& packed, const float* grad,
                                       const int64_t* offset, const int64_t* used,
                                       const Sums& sums) {
  using Vector = typename VectorOf<Lanes>::Type;
  const float* input = packed.input;
  for (int64_t sample = 0; sample < packed.samples; ++sample) {
    Tile<Lanes, 1, Offsets> tile;
    tile.clear();
    for (int64_t p = 0; p < packed.positions; ++p) {
      const float* const x = input + packed.at[p];
      const Vector e = *reinterpret_cast<const Vector*>(grad + p * Lanes);
#pragma GCC unroll 16
      for (int k = 0; k < Offsets; ++k) {
        tile.sum[0][k] += e * *reinterpret_cast<const Vector*>(x + offset[k]);
      }
    }
    tile.end(packed, sums, sample, 1, used);
    grad += packed.grad_size;
    input += packed.input_size;
  }
}

}  // namespace fitcompress
