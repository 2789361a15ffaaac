// Gram matrices in float32: products of the places of a tensor with each other, summed over its
// features.
//
// Features are taken in blocks that fit in the cache, packed as panels, panel[f][p], one for each
// vector of places. Tiles of the result are kept in registers over a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/transpose.h"
#include "fisher/ghost_places.h"

namespace fitcompress {

constexpr int64_t kGramFeatures = 256;      // of a block, at most
constexpr int64_t kGramPanels = 96 * 1024;  // floats of all its panels, if that many do

// A feature at a place: data[f · feature_stride + offset of the place].
struct GramOperand {
  const float* data;
  int64_t feature_stride;
  const Places* places;
};

constexpr int64_t gram_features(int64_t places) {
  return std::max<int64_t>(
      32, std::min(kGramFeatures, kGramPanels / std::max<int64_t>(1, places) / 32 * 32));
}

// Floats that the panels of at most so many places, of rows and columns together, take: those of
// fewer places have more features.
constexpr int64_t gram_panels(int64_t places) {
  const int64_t padded = places + 2 * 15;
  return std::max(kGramPanels, 32 * places) + padded + 2 * 15 * kGramFeatures;
}

// Rows × Vectors elements a tile, as many as fit in registers.
template <int Lanes>
constexpr int kGramRows = Lanes == 16 ? 8 : 4;
template <int Lanes>
constexpr int kGramVectors = Lanes == 4 ? 2 : 3;

template <int Lanes>
FITCOMPRESS_INLINE void copy_floats(const float* from, int64_t length, float* to) {
  if (length == Lanes) {
    std::memcpy(to, from, Lanes * sizeof(float));
    return;
  }
  if (length & 8) std::memcpy(to, from, 32), from += 8, to += 8;
  if (length & 4) std::memcpy(to, from, 16), from += 4, to += 4;
  if (length & 2) std::memcpy(to, from, 8), from += 2, to += 2;
  if (length & 1) *to = *from;
}

// Features [first, first + count) as panels, `size` floats each, with zeros beyond the last place.
template <int Lanes>
FITCOMPRESS_INLINE void pack(const GramOperand& operand, int64_t first, int64_t count, int64_t size,
                             float* panels) {
  const Places& places = *operand.places;
  const int64_t vectors = (places.count + Lanes - 1) / Lanes;
  const float* const data = operand.data + first * operand.feature_stride;
  if (operand.feature_stride == 1 && places.step != 1) {
    alignas(64) static constexpr float kZeros[kGramFeatures] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const float* rows[Lanes];
      for (int l = 0; l < Lanes; ++l) {
        const int64_t p = v * Lanes + l;
        rows[l] = p < places.count ? data + places.offsets()[p] : kZeros;
      }
      float* const to = panels + v * size;
      int64_t f = 0;
      for (; f + Lanes <= count; f += Lanes) {
        const auto row = [&](int i) __attribute__((always_inline)) { return rows[i] + f; };
        transpose<Lanes>(row, to + f * Lanes);
      }
      for (; f < count; ++f)
        for (int l = 0; l < Lanes; ++l) to[f * Lanes + l] = rows[l][f];
    }
    return;
  }
  if (places.count % Lanes != 0) {
    std::memset(panels + (vectors - 1) * size, 0,
                static_cast<size_t>(count * Lanes) * sizeof(float));
  }
  for (int64_t f = 0; f < count; ++f) {
    const float* const row = data + f * operand.feature_stride;
    float* const to = panels + f * Lanes;
    for (int64_t r = 0; r < places.runs; ++r) {
      const PlaceRun& run = places.run(r);
      const float* from = row + run.at;
      const int64_t end = run.first + run.length;
      for (int64_t p = run.first, now; p < end; p += now, from += now * places.step) {
        now = std::min(Lanes - p % Lanes, end - p);
        float* const at = to + p / Lanes * size + p % Lanes;
        if (places.step == 1) {
          copy_floats<Lanes>(from, now, at);
        } else {
          for (int64_t i = 0; i < now; ++i) at[i] = from[i * places.step];
        }
      }
    }
  }
}

// to[r][c] = (add ? to[r][c] : 0) + Σ_f rows[f][r] · columns[f][c], for Rows × (Vectors · Lanes)
// elements.
template <int Lanes, int Rows, int Vectors>
FITCOMPRESS_INLINE void multiply_tile(const float* rows, const float* columns, int64_t size,
                                      int64_t count, bool add, float* to, int64_t stride) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector sum[Rows][Vectors] = {};
  for (int64_t f = 0; f < count; ++f) {
    Vector column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(columns + v * size + f * Lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += rows[f * Lanes + r] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      auto* const at = reinterpret_cast<Vector*>(to + r * stride + v * Lanes);
      *at = add ? *at + sum[r][v] : sum[r][v];
    }
  }
}

// All tiles of one block of features; with `upper` only those that reach the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_panels(const float* rows, int64_t height, const float* columns,
                                        int64_t width, bool upper, int64_t size, int64_t count,
                                        bool add, float* to, int64_t stride) {
  constexpr int kRows = kGramRows<Lanes>;
  const int64_t vectors = (width + Lanes - 1) / Lanes;
  for (int64_t group = 0; group < vectors; group += kGramVectors<Lanes>) {
    const int64_t end = std::min<int64_t>(group + kGramVectors<Lanes>, vectors);
    const int64_t last = upper ? std::min(height, end * Lanes) : height;
    for (int64_t r = 0; r < last; r += kRows) {
      const int64_t v = upper ? std::max(group, r / Lanes) : group;
      const float* const a = rows + r / Lanes * size + r % Lanes;
      const float* const b = columns + v * size;
      float* const tile = to + r * stride + v * Lanes;
      switch (end - v) {
        case 3:
          multiply_tile<Lanes, kRows, 3>(a, b, size, count, add, tile, stride);
          break;
        case 2:
          multiply_tile<Lanes, kRows, 2>(a, b, size, count, add, tile, stride);
          break;
        default:
          multiply_tile<Lanes, kRows, 1>(a, b, size, count, add, tile, stride);
      }
    }
  }
}

// gram[r][c] = Σ_f rows[f, r] · columns[f, c], rows `stride` floats apart; up to a whole vector of
// columns and 8 rows are written. With `upper`, which says that both are the same, at least all on
// and above the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_places(const GramOperand& rows, const GramOperand& columns,
                                        bool upper, int64_t features, float* panels, float* gram,
                                        int64_t stride) {
  const int64_t height = rows.places->count, width = columns.places->count;
  const int64_t block = gram_features(upper ? width : width + height);
  const int64_t size = (block + 1) * Lanes;  // no power of two
  float* const others = upper ? panels : panels + (width + Lanes - 1) / Lanes * size;
  if (features == 0) {
    for (int64_t r = 0; r < height; ++r) {
      std::memset(gram + r * stride, 0, static_cast<size_t>(width) * sizeof(float));
    }
  }
  for (int64_t f = 0; f < features; f += block) {
    const int64_t count = std::min(block, features - f);
    pack<Lanes>(columns, f, count, size, panels);
    if (!upper) pack<Lanes>(rows, f, count, size, others);
    multiply_panels<Lanes>(others, height, panels, width, upper, size, count, f > 0, gram, stride);
  }
}

}  // namespace fitcompress
