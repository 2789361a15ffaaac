// A yes/no question whose probability is learnt from its answers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fitcompress {

// The probability of a 1, p / 2^22, and from how many answers it was learnt.
struct AdaptiveBit {
  std::uint32_t p : 22;
  std::uint32_t count : 10;

  static constexpr int kLargestCount = 255;

  // A question whose answer is 1 with probability p16 / 2^16, a guess worth four answers.
  static AdaptiveBit start(std::int64_t p16) { return {static_cast<std::uint32_t>(p16 << 6), 4}; }
};

// Steps towards an answer: 131072 / (2n + 3) after n of them.
inline const std::array<std::int64_t, AdaptiveBit::kLargestCount + 1>& learning_rates() {
  static const auto rates = [] {
    std::array<std::int64_t, AdaptiveBit::kLargestCount + 1> result{};
    for (int n = 0; n <= AdaptiveBit::kLargestCount; ++n) result[n] = 131072 / (2 * n + 3);
    return result;
  }();
  return rates;
}

// Writes or reads an answer, whichever the coder does, and learns from it.
template <class Coder>
inline bool code_adaptive(Coder* coder, bool value, AdaptiveBit* b,
                          const std::int64_t* learning_rate) {
  const std::uint32_t p = b->p;
  value = coder->code(value, std::clamp<std::uint32_t>(p >> 6, 32, 65504));
  const std::int64_t target = value ? (1 << 22) - 1 : 0;
  b->p =
      static_cast<std::uint32_t>(p + (((target - p) * learning_rate[b->count]) >> 16)) & 0x3FFFFF;
  if (b->count < AdaptiveBit::kLargestCount) b->count = (b->count + 1) & 0x3FF;
  return value;
}

}  // namespace fitcompress
