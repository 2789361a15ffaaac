// Rounding to the nearest integer, ties to even, in arithmetic that every instruction set has: the
// same bits everywhere, and loops vectorise. Compile without -ffast-math.
#pragma once

#include "common/isa.h"

namespace fitcompress {

// Adding 2^23 pushes the fraction out of the mantissa; larger numbers are integers already. Never
// -0, so that a code of zero and the weight it stands for have one representation.
FITCOMPRESS_INLINE float round_even(float x) {
  constexpr float kBig = 8388608.0f;
  const float shift = x < 0.0f ? -kBig : kBig;
  const float rounded = (x + shift) - shift;
  const float magnitude = x < 0.0f ? -x : x;
  return (magnitude < kBig ? rounded : x) + 0.0f;
}

FITCOMPRESS_INLINE double round_even(double x) {
  constexpr double kBig = 4503599627370496.0;
  const double shift = x < 0.0 ? -kBig : kBig;
  const double rounded = (x + shift) - shift;
  const double magnitude = x < 0.0 ? -x : x;
  return (magnitude < kBig ? rounded : x) + 0.0;
}

}  // namespace fitcompress
