// The transposition of a square of vectors.
#pragma once

#include <cstring>
#include <utility>

#include "common/vector.h"

namespace fitcompress {

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

// The same for rows in memory, row i at row(i), at any address.
template <int Lanes, class Row>
FITCOMPRESS_INLINE void transpose(const Row& row, float* to) {
  typename VectorOf<Lanes>::Type rows[Lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) std::memcpy(&rows[i], row(i), sizeof(rows[i]));
  transpose<Lanes>(rows, to);
}

}  // namespace fitcompress
