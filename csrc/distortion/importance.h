// The importance of weights as keys: bit patterns of float32 numbers ≥ 0, which order like them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fitcompress {

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;

enum class ImportanceRule { kMagnitude, kFisher, kGiven };

template <class T>
struct Importance {
  ImportanceRule rule;
  const T* weight;
  const float* fisher;
  const float* given;
  float offset;

  // The keys of the weights [begin, begin + count).
  FITCOMPRESS_INLINE void keys(int64_t begin, int64_t count, uint32_t* key) const {
    switch (rule) {
      case ImportanceRule::kMagnitude:
        for (int64_t j = 0; j < count; ++j) {
          key[j] = bits_of_float(to_float(weight[begin + j])) & kMagnitudeBits;
        }
        return;
      case ImportanceRule::kFisher:
        for (int64_t j = 0; j < count; ++j) {
          const float w = to_float(weight[begin + j]);
          key[j] = bits_of_float((fisher[begin + j] + offset) * (w * w)) & kMagnitudeBits;
        }
        return;
      case ImportanceRule::kGiven:
        for (int64_t j = 0; j < count; ++j) {
          key[j] = bits_of_float(given[begin + j]) & kMagnitudeBits;
        }
    }
  }

  // How many trailing bits of every key are 0.
  int zero_bits() const {
    if (rule != ImportanceRule::kMagnitude || sizeof(T) == 4) return 0;
    return std::is_same_v<T, BFloat16> ? 16 : 13;
  }
};

}  // namespace fitcompress
