// Vectors of floats of any length, and rearranging them in registers.
#pragma once

#include <cstdint>
#include <utility>

#include "common/isa.h"

namespace fitcompress {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int Lanes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(Lanes * sizeof(float)), may_alias));
  typedef Type Anywhere __attribute__((aligned(4)));  // at any address
  typedef int32_t Indices __attribute__((vector_size(Lanes * sizeof(int32_t)), may_alias));
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

// value[l] = the value[index[l]] it was.
template <int Lanes>
FITCOMPRESS_INLINE void permute(typename VectorOf<Lanes>::Type* value,
                                const typename VectorOf<Lanes>::Indices& index) {
#if defined(__clang__)
  const auto from = *value;
  for (int l = 0; l < Lanes; ++l) (*value)[l] = from[index[l]];
#else
  *value = __builtin_shuffle(*value, index);
#endif
}

}  // namespace fitcompress
