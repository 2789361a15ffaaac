// Products and sums of the unfolded features of one tile: float32 in registers over the tile, then
// added to float64 totals.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"
#include "compensate/input_patches.h"

namespace fitcompress {

// sums[f] += Σ_p panel[p][f].
template <int Lanes>
FITCOMPRESS_INLINE void add_sums(const float* panels, int64_t width, int64_t length, double* sums) {
  using Vector = typename VectorOf<Lanes>::Type;
  for (int64_t f = 0; f < width; f += Lanes, panels += panel_size<Lanes>(), sums += Lanes) {
    const auto* const at = reinterpret_cast<const Vector*>(panels);
    Vector s0{}, s1{}, s2{}, s3{};
    int64_t p = 0;
    for (; p + 4 <= length; p += 4) s0 += at[p], s1 += at[p + 1], s2 += at[p + 2], s3 += at[p + 3];
    for (; p < length; ++p) s0 += at[p];
    const Vector sum = (s0 + s1) + (s2 + s3);
    for (int l = 0; l < Lanes; ++l) sums[l] += sum[l];
  }
}

// Rows × Vectors elements a tile, as many as fit in registers.
template <int Lanes>
constexpr int kTileRows = Lanes == 16 ? 8 : 4;
template <int Lanes>
constexpr int kTileVectors = Lanes == 4 ? 2 : 3;

// total[r][c] += Σ_p rows[p][r] · columns[p][c] for Rows × (Vectors · Lanes) elements.
template <int Lanes, int Rows, int Vectors>
FITCOMPRESS_INLINE void multiply_tile(const float* rows, const float* columns, int64_t length,
                                      double* total, int64_t stride) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector sum[Rows][Vectors] = {};
  for (int64_t p = 0; p < length; ++p) {
    Vector column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(columns + v * panel_size<Lanes>() + p * Lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += rows[p * Lanes + r] * column[v];
    }
  }
  alignas(64) float product[Vectors * Lanes];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) reinterpret_cast<Vector*>(product)[v] = sum[r][v];
    double* const to = total + r * stride;
    for (int c = 0; c < Vectors * Lanes; ++c) to[c] += product[c];
  }
}

// total += rowsᵀ columns; with `upper` at least all elements on and above the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void multiply(const float* rows, int64_t height, const float* columns,
                                 int64_t width, bool upper, int64_t length, double* total) {
  constexpr int kRows = kTileRows<Lanes>;
  const int64_t vectors = ceil_div(width, Lanes), stride = vectors * Lanes;
  for (int64_t group = 0; group < vectors; group += kTileVectors<Lanes>) {
    const int64_t end = std::min<int64_t>(group + kTileVectors<Lanes>, vectors);
    const int64_t last = upper ? std::min(height, end * Lanes) : height;
    for (int64_t r = 0; r < last; r += kRows) {
      const int64_t v = upper ? std::max(group, r / Lanes) : group;
      const float* const a = rows + r / Lanes * panel_size<Lanes>() + r % Lanes;
      const float* const b = columns + v * panel_size<Lanes>();
      double* const to = total + r * stride + v * Lanes;
      switch (end - v) {
        case 3:
          multiply_tile<Lanes, kRows, 3>(a, b, length, to, stride);
          break;
        case 2:
          multiply_tile<Lanes, kRows, 2>(a, b, length, to, stride);
          break;
        default:
          multiply_tile<Lanes, kRows, 1>(a, b, length, to, stride);
      }
    }
  }
}

// Few features would leave panels mostly empty: their rows of positions are multiplied with each
// other, kStrip rows at a time, and each element of the result stays a vector until the end.
constexpr int kStrip = 3;

// total[e] += Σ rows[r]·columns[c] for all r and c below kStrip, e in that order, over `vectors`
// vectors of positions. Rows beyond the last are read and their products not used.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_strips(const float* rows, const float* columns, int64_t vectors,
                                        double* total) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector sum[kStrip][kStrip] = {};
  for (int64_t p = 0; p < vectors * Lanes; p += Lanes) {
    Vector column[kStrip];
#pragma GCC unroll 3
    for (int c = 0; c < kStrip; ++c) {
      column[c] = *reinterpret_cast<const Vector*>(columns + c * kRowStride + p);
    }
#pragma GCC unroll 3
    for (int r = 0; r < kStrip; ++r) {
      const Vector row = *reinterpret_cast<const Vector*>(rows + r * kRowStride + p);
#pragma GCC unroll 3
      for (int c = 0; c < kStrip; ++c) sum[r][c] += row * column[c];
    }
  }
  alignas(64) float product[Lanes];
#pragma GCC unroll 3
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kStrip; ++c, total += Lanes) {
      *reinterpret_cast<Vector*>(product) = sum[r][c];
      for (int l = 0; l < Lanes; ++l) total[l] += product[l];
    }
  }
}

}  // namespace fitcompress
