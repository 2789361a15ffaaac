// Vectors of floats from and to memory that holds floats of 32 or 16 bits: the same bits as
// to_float and from_float.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/vector.h"

namespace fitcompress {

// Lanes of 16 bits, and the same numbers in lanes of 32 bits. (GCC 12 converts vectors only where
// their types do not depend on a template's argument.)
template <int Lanes>
struct HalfLanes;

#define FITCOMPRESS_HALF_LANES(LANES)                                                       \
  template <>                                                                               \
  struct HalfLanes<LANES> {                                                                 \
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4), may_alias));               \
    typedef uint16_t Halves __attribute__((vector_size(LANES * 2), may_alias, aligned(2))); \
    static FITCOMPRESS_INLINE void load(const void* from, Bits* to) {                       \
      *to = __builtin_convertvector(*static_cast<const Halves*>(from), Bits);               \
    }                                                                                       \
    static FITCOMPRESS_INLINE void store(const Bits& from, void* to) {                      \
      *static_cast<Halves*>(to) = __builtin_convertvector(from, Halves);                    \
    }                                                                                       \
  };
FITCOMPRESS_HALF_LANES(4)
FITCOMPRESS_HALF_LANES(8)
FITCOMPRESS_HALF_LANES(16)
#undef FITCOMPRESS_HALF_LANES

template <int Lanes>
struct VectorFloat {
  using Floats = typename VectorOf<Lanes>::Type;
  using Anywhere = typename VectorOf<Lanes>::Anywhere;
  using Bits = typename HalfLanes<Lanes>::Bits;

  static FITCOMPRESS_INLINE void load(const float* from, Floats* to) {
    *to = *reinterpret_cast<const Anywhere*>(from);
  }
  static FITCOMPRESS_INLINE void store(const Floats& from, float* to) {
    *reinterpret_cast<Anywhere*>(to) = from;
  }

  static FITCOMPRESS_INLINE void load(const BFloat16* from, Floats* to) {
    Bits bits;
    HalfLanes<Lanes>::load(from, &bits);
    bits = bits << 16;
    *to = reinterpret_cast<Floats>(bits);
  }
  static FITCOMPRESS_INLINE void store(const Floats& from, BFloat16* to) {
    const Bits bits = reinterpret_cast<Bits>(from);
    Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = from != from ? Bits{} + 0x7fc0u : rounded;
    HalfLanes<Lanes>::store(rounded, to);
  }

  static FITCOMPRESS_INLINE void load(const Float16* from, Floats* to) {
    Bits bits;
    HalfLanes<Lanes>::load(from, &bits);
    const Bits magnitude = (bits & 0x7fffu) << 13;
    const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
    const Bits finite = reinterpret_cast<Bits>(scaled);
    const Bits absolute = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
    const Bits result = absolute | ((bits & 0x8000u) << 16);
    *to = reinterpret_cast<Floats>(result);
  }
  static FITCOMPRESS_INLINE void store(const Floats& from, Float16* to) {
    const Bits bits = reinterpret_cast<Bits>(from);
    const Bits doubled = bits + bits;
    const Bits absolute = bits & 0x7fffffffu;
    const Floats scaled = (reinterpret_cast<Floats>(absolute) * 0x1p112f) * 0x1p-110f;
    const Bits exponent = doubled & 0xff000000u;
    const Bits bias = exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent;
    const Bits base = (bias >> 1) + 0x07800000u;
    const Floats sum = reinterpret_cast<Floats>(base) + scaled;
    const Bits sum_bits = reinterpret_cast<Bits>(sum);
    const Bits finite = ((sum_bits >> 13) & 0x7c00u) + (sum_bits & 0x0fffu);
    const Bits sign = (bits >> 16) & 0x8000u;
    const Bits result = sign | (doubled > 0xff000000u ? Bits{} + 0x7e00u : finite);
    HalfLanes<Lanes>::store(result, to);
  }
};

}  // namespace fitcompress
