// Gram matrices in float32: products of the places of a tensor with each other, summed over its
// features.
//
// Features are taken in blocks that fit in the cache, packed as panels (gram_panels.h). Tiles of
// the result are kept in registers over a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/transpose.h"
#include "fisher/gram_panels.h"

namespace fitcompress {

// Rows × Vectors elements a tile, as many as fit in registers.
template <int Lanes>
constexpr int kGramRows = Lanes == 16 ? 8 : 4;
template <int Lanes>
constexpr int kGramVectors = Lanes == 4 ? 2 : 3;

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
                                        bool upper, int64_t features, const GramScratch& scratch,
                                        float* gram, int64_t stride) {
  float* const panels = scratch.panels;
  const int64_t height = rows.places->count, width = columns.places->count;
  const int64_t block = std::min(gram_features(upper ? width : width + height), features);
  const int64_t size = (block + 1) * Lanes;  // no power of two
  float* const others = upper ? panels : panels + (width + Lanes - 1) / Lanes * size;
  if (features == 0) {
    for (int64_t r = 0; r < height; ++r) {
      std::memset(gram + r * stride, 0, static_cast<size_t>(width) * sizeof(float));
    }
  }
  for (int64_t f = 0; f < features; f += block) {
    const int64_t count = std::min(block, features - f);
    pack<Lanes>(columns, f, count, size, scratch.pieces, panels);
    if (!upper) pack<Lanes>(rows, f, count, size, scratch.pieces, others);
    multiply_panels<Lanes>(others, height, panels, width, upper, size, count, f > 0, gram, stride);
  }
}

}  // namespace fitcompress
