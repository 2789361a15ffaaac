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
constexpr double kNormScale = 1.0 / (576 * 576);  // of squares of A's values in two dimensions

// D x
template <class Vector>
FITCOMPRESS_INLINE void input_points(const Vector (&x)[kWindow], Vector (&to)[kWindow]) {
  const Vector even1 = x[4] - 4.0f * x[2], odd1 = x[3] - 4.0f * x[1];
  const Vector even2 = x[4] - x[2], odd2 = x[3] - x[1];
  to[0] = 4.0f * x[0] + (x[4] - 5.0f * x[2]);
  to[1] = even1 + odd1;
  to[2] = even1 - odd1;
  to[3] = even2 + 2.0f * odd2;
  to[4] = even2 - 2.0f * odd2;
  to[5] = 4.0f * x[1] + (x[5] - 5.0f * x[3]);
}

// C e
template <class Vector>
FITCOMPRESS_INLINE void grad_points(const Vector (&e)[kTile], Vector (&to)[kWindow]) {
  const Vector even1 = e[0] + e[2], odd1 = e[1] + e[3];
  const Vector even2 = e[0] + 4.0f * e[2], odd2 = e[1] + 4.0f * e[3];
  to[0] = e[0];
  to[1] = even1 + odd1;
  to[2] = even1 - odd1;
  to[3] = even2 + 2.0f * odd2;
  to[4] = even2 - 2.0f * odd2;
  to[5] = e[3];
}

// A m
template <class Vector>
FITCOMPRESS_INLINE void values_of_points(const Vector (&m)[kWindow], Vector (&to)[3]) {
  const Vector even1 = 4.0f * (m[1] + m[2]), odd1 = m[1] - m[2];
  const Vector even2 = m[3] + m[4], odd2 = m[3] - m[4];
  to[0] = 6.0f * m[0] + (even2 - even1);
  to[1] = 2.0f * odd2 - 4.0f * odd1;
  to[2] = 24.0f * m[5] + (4.0f * even2 - even1);
}

// Both transforms: Size × Size vectors, rows `pitch` floats apart, to 36 vectors `stride` apart.
template <int Lanes, int Size>
FITCOMPRESS_INLINE void transform_tile(const float* from, int64_t pitch, float* to,
                                       int64_t stride) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector half[kWindow][Size];
  const auto points = [](const Vector(&x)[Size], Vector(&y)[kWindow])
                          __attribute__((always_inline)) {
                            if constexpr (Size == kWindow) {
                              input_points(x, y);
                            } else {
                              grad_points(x, y);
                            }
                          };
#pragma GCC unroll 6
  for (int w = 0; w < Size; ++w) {
    Vector column[Size], result[kWindow];
#pragma GCC unroll 6
    for (int h = 0; h < Size; ++h) {
      column[h] = *reinterpret_cast<const Vector*>(from + h * pitch + w * Lanes);
    }
    points(column, result);
#pragma GCC unroll 6
    for (int h = 0; h < kWindow; ++h) half[h][w] = result[h];
  }
#pragma GCC unroll 6
  for (int h = 0; h < kWindow; ++h) {
    Vector result[kWindow];
    points(half[h], result);
#pragma GCC unroll 6
    for (int w = 0; w < kWindow; ++w) {
      *reinterpret_cast<Vector*>(to + (h * kWindow + w) * stride) = result[w];
    }
  }
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
