// Winograd's minimal filtering F(3, 4): the three values y[k] = Σ_p e[p] x[p + k] of four gradients
// and six inputs take six products,
//
//   y = A ((C e) ∘ (D x)),
//
// by evaluation of polynomials at 0, ±1, ±2 and ∞. In two dimensions, 4 × 4 gradients and 6 × 6
// inputs, the maps act on rows and columns, and 36 products replace 144. A is linear: products may
// be summed first. Here A is 24 times what it should be: all constants are small integers then,
// exact in floating point.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/vector.h"

namespace fitcompress {

constexpr int kTile = 4, kWindow = 6;             // gradients and inputs of a tile, along a side
constexpr int kPoints = kWindow * kWindow;        // products of a tile
constexpr double kNormScale = 1.0 / (576 * 576);  // of squares of such values in two dimensions

// Points come in pairs: 0 and ∞, ±1, ±2. One pair of D x, or of C e.
template <int Pair, class Vector>
FITCOMPRESS_INLINE void points(const Vector (&x)[kWindow], Vector* first, Vector* second) {
  if constexpr (Pair == 0) {
    *first = 4.0f * x[0] + (x[4] - 5.0f * x[2]);
    *second = 4.0f * x[1] + (x[5] - 5.0f * x[3]);
  } else {
    const Vector even = Pair == 1 ? x[4] - 4.0f * x[2] : x[4] - x[2];
    const Vector odd = Pair == 1 ? x[3] - 4.0f * x[1] : 2.0f * (x[3] - x[1]);
    *first = even + odd;
    *second = even - odd;
  }
}

template <int Pair, class Vector>
FITCOMPRESS_INLINE void points(const Vector (&e)[kTile], Vector* first, Vector* second) {
  if constexpr (Pair == 0) {
    *first = e[0];
    *second = e[3];
  } else {
    const Vector even = Pair == 1 ? e[0] + e[2] : e[0] + 4.0f * e[2];
    const Vector odd = Pair == 1 ? e[1] + e[3] : 2.0f * e[1] + 8.0f * e[3];
    *first = even + odd;
    *second = even - odd;
  }
}

// A m
template <class Vector>
FITCOMPRESS_INLINE void values_of_points(const Vector (&m)[kWindow], Vector (&to)[3]) {
  const Vector even1 = 4.0f * (m[2] + m[3]), odd1 = m[2] - m[3];
  const Vector even2 = m[4] + m[5], odd2 = m[4] - m[5];
  to[0] = 6.0f * m[0] + (even2 - even1);
  to[1] = 2.0f * odd2 - 4.0f * odd1;
  to[2] = 24.0f * m[1] + (4.0f * even2 - even1);
}

// All points of a row, to vectors `stride` floats apart.
template <class Vector, int Size>
FITCOMPRESS_INLINE void store_points(const Vector (&row)[Size], float* to, int64_t stride) {
  Vector result[kWindow];
  points<0>(row, &result[0], &result[1]);
  points<1>(row, &result[2], &result[3]);
  points<2>(row, &result[4], &result[5]);
#pragma GCC unroll 6
  for (int w = 0; w < kWindow; ++w) *reinterpret_cast<Vector*>(to + w * stride) = result[w];
}

// Both transforms of one pair of points along the height: few enough values for the registers.
template <int Lanes, int Size, int Pair>
FITCOMPRESS_INLINE void transform_pair(const float* from, int64_t pitch, float* to,
                                       int64_t stride) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector first[Size], second[Size];
#pragma GCC unroll 6
  for (int w = 0; w < Size; ++w) {
    Vector column[Size];
#pragma GCC unroll 6
    for (int h = 0; h < Size; ++h) {
      column[h] = *reinterpret_cast<const Vector*>(from + h * pitch + w * Lanes);
    }
    points<Pair>(column, &first[w], &second[w]);
  }
  store_points(first, to + 2 * Pair * kWindow * stride, stride);
  store_points(second, to + (2 * Pair + 1) * kWindow * stride, stride);
}

// Size × Size vectors, rows `pitch` floats apart, to 36 vectors `stride` apart.
template <int Lanes, int Size>
FITCOMPRESS_INLINE void transform_tile(const float* from, int64_t pitch, float* to,
                                       int64_t stride) {
  transform_pair<Lanes, Size, 0>(from, pitch, to, stride);
  transform_pair<Lanes, Size, 1>(from, pitch, to, stride);
  transform_pair<Lanes, Size, 2>(from, pitch, to, stride);
}

// *sum += Σ (A m Aᵀ)² over the nine values, for 36 vectors of sums of products, `stride` floats
// apart.
template <int Lanes>
FITCOMPRESS_INLINE void add_squares(const float* from, int64_t stride,
                                    typename VectorOf<Lanes>::Type* sum) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector half[3][kWindow];
#pragma GCC unroll 6
  for (int w = 0; w < kWindow; ++w) {
    Vector column[kWindow], result[3];
#pragma GCC unroll 6
    for (int h = 0; h < kWindow; ++h) {
      column[h] = *reinterpret_cast<const Vector*>(from + (h * kWindow + w) * stride);
    }
    values_of_points(column, result);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) half[k][w] = result[k];
  }
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    Vector result[3];
    values_of_points(half[k], result);
#pragma GCC unroll 3
    for (int l = 0; l < 3; ++l) *sum += result[l] * result[l];
  }
}

}  // namespace fitcompress
