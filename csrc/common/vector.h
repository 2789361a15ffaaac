// Vectors of floats of any length, and the transposition of a square of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/isa.h"

namespace fitcompress {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int Lanes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(Lanes * sizeof(float)), may_alias));
};

template <size_t... L, class Vector>
FITCOMPRESS_INLINE void interleave(std::index_sequence<L...>, const Vector& a, const Vector& b,
                                   Vector* low, Vector* high) {
  constexpr size_t n = sizeof...(L);
  *low = __builtin_shufflevector(a, b, (L / 2 + L % 2 * n)...);
  *high = __builtin_shufflevector(a, b, (L / 2 + n / 2 + L % 2 * n)...);
}

// *result = elements 0, 2, … of a and then 1, 3, … of b.
template <size_t... L, class Vector>
FITCOMPRESS_INLINE void take_second(std::index_sequence<L...>, const Vector& a, const Vector& b,
                                    Vector* result) {
  constexpr size_t n = sizeof...(L);
  *result = __builtin_shufflevector(a, b, (2 * L < n ? 2 * L : 2 * L + 1)...);
}

// Writes the columns of Lanes rows of Lanes floats, one after the other and `stride` floats apart:
// log₂ Lanes perfect shuffles of all rows. The rows are used as work space.
template <int Lanes>
FITCOMPRESS_INLINE void transpose(typename VectorOf<Lanes>::Type (&even)[Lanes], float* to,
                                  int64_t stride = Lanes) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector odd[Lanes];
  const auto shuffle = [](const Vector* in, Vector* out) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes / 2; ++i) {
      interleave(std::make_index_sequence<Lanes>(), in[i], in[i + Lanes / 2], &out[2 * i],
                 &out[2 * i + 1]);
    }
  };
  shuffle(even, odd);
  shuffle(odd, even);
  if (Lanes >= 8) shuffle(even, odd);
  if (Lanes == 16) shuffle(odd, even);
  const Vector* const result = Lanes == 8 ? odd : even;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) std::memcpy(to + i * stride, &result[i], sizeof(Vector));
}

}  // namespace fitcompress
