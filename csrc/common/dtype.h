// Element types, and 16-bit floats as plain integers that any compiler can vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FITCOMPRESS_HOST_DEVICE __host__ __device__
#else
#define FITCOMPRESS_HOST_DEVICE
#endif

namespace fitcompress {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16, kInt32, kInt64, kUInt8, kBool, kOther };

inline const char* name(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16",           "int32",
                                    "int64",   "uint8",   "bool",    "an unsupported type"};
  return kNames[static_cast<int>(dtype)];
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FITCOMPRESS_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FITCOMPRESS_HOST_DEVICE inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FITCOMPRESS_HOST_DEVICE inline float to_float(float value) { return value; }

FITCOMPRESS_HOST_DEVICE inline float to_float(BFloat16 value) {
  return float_of_bits(uint32_t{value.bits} << 16);
}

// Shifts exponent and mantissa into place and corrects the bias by an exact multiplication, which
// also makes subnormal numbers come out right.
FITCOMPRESS_HOST_DEVICE inline float to_float(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  const uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
  return float_of_bits(bits | ((value.bits & 0x8000u) << 16));
}

FITCOMPRESS_HOST_DEVICE inline void from_float(float value, float* result) { *result = value; }

FITCOMPRESS_HOST_DEVICE inline void from_float(float value, BFloat16* result) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Adding a power of two chosen by the exponent rounds the mantissa to 10 bits, ties to even;
// scaling up and down first turns what is too large into infinity.
FITCOMPRESS_HOST_DEVICE inline void from_float(float value, Float16* result) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t doubled = bits + bits;
  const float magnitude = float_of_bits(bits & 0x7fffffffu);
  const float scaled = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = doubled & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bits_of_float(float_of_bits((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  result->bits = static_cast<uint16_t>(sign | (doubled > 0xff000000u ? 0x7e00u : finite));
}

}  // namespace fitcompress
