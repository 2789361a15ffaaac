// Asymmetric numeral system: one number holds all symbols so far, and sheds 16 bits as it grows.
//
// A symbol of frequency f of 2^bits, after symbols of frequencies that sum to `first`, turns the
// state x into (x / f) · 2^bits + x mod f + first, an increase by the factor 2^bits / f. States
// stay in [2^16, 2^32). What goes in last comes out first, so encoders start at the end.
#pragma once

#include <cstdint>

namespace fitcompress {

constexpr std::uint32_t kSmallestState = 1u << 16;

// Puts a symbol into the state; low 16 bits that leave it go to emit(word), at most once.
template <class Emit>
inline std::uint32_t put_symbol(std::uint32_t x, std::uint32_t frequency, std::uint32_t first,
                                int bits, Emit emit) {
  if (x >= std::uint64_t{frequency} << (32 - bits)) {
    emit(static_cast<std::uint16_t>(x));
    x >>= 16;
  }
  return ((x / frequency) << bits) + x % frequency + first;
}

}  // namespace fitcompress
