// Vectors of floats; rearranging them in registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/isa.h"

namespace fitcompress {

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

// Transposes Lanes × Lanes floats, row i at row(i), to `to`, which is aligned: log₂ Lanes perfect
// shuffles of all rows.
template <int Lanes, class Row>
FITCOMPRESS_INLINE void transpose(const Row& row, float* to) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector even[Lanes], odd[Lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) std::memcpy(&even[i], row(i), sizeof(Vector));
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
  for (int i = 0; i < Lanes; ++i) *reinterpret_cast<Vector*>(to + i * Lanes) = result[i];
}

}  // namespace fitcompress
