// The probabilities under which integer weight codes are coded, learnt from the codes before.
//
// A code x is a few yes/no questions: x != 0? sign? |x| > 1? > 2? ... and from 14 on an Exp-Golomb
// number. Each question has an adaptive probability, looked up by two things:
//   scale: the magnitude to expect, (mean |x| of the row)(mean |x| of the input channel)/(mean |x|)
//   guess: a linear prediction of x from earlier weights of the same kernel (kernels are smooth)
//          or, without kernels, from left and upper neighbours; its coefficients learn by LMS.
// Encoder and decoder run the same code: Coder::code(bit, p) writes or reads a bit. Fixed point,
// where not said otherwise: 256 is 1. range_coder_reference.py is the twin in Python.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "storage/adaptive_bit.h"

namespace fitcompress {

constexpr std::int32_t kLargestCode = 1 << 30;
constexpr int kLargestPeriod = 64;
constexpr int kLargestScale = 97;  // stands for 2^24, a mean magnitude of 65536

// The mean magnitude that a scale byte of 1 ... kLargestScale stands for: four steps an octave.
inline std::int64_t scale_value(int scale) {
  return (std::int64_t{4 + (scale - 1) % 4} << ((scale - 1) / 4)) >> 2;
}

// 0 below 1/16, then two buckets an octave.
inline int bucket_of(std::int64_t value, int largest) {
  int bucket = 0;
  for (; value >= 32; value >>= 1) bucket += 2;
  if (value >= 16) bucket += value >= 24 ? 2 : 1;
  return std::min(bucket, largest);
}

// Magnitudes above this one count as it in statistics and predictions.
inline std::int32_t largest_counted(int scale) {
  return static_cast<std::int32_t>(std::min<std::int64_t>((scale_value(scale) >> 5) + 1, 1 << 15));
}

// What a channel's sum starts at.
inline std::int64_t first_channel_sum(int scale) { return 12 * scale_value(scale); }

// Whether 32 bits hold every channel's sum. Where they do not, a channel has at least 254 weights,
// and 64 bits for it are little beside them.
inline bool sums_are_small(std::int64_t rows, int period, int scale) {
  const std::int64_t largest =
      first_channel_sum(scale) + 256 * rows * period * largest_counted(scale);
  return largest <= std::numeric_limits<std::int32_t>::max();
}

// Sum: of the magnitudes of a channel.
template <class Coder, class Sum = std::int64_t>
class WeightModel {
 public:
  // codes: the matrix [*, cols]; only what has been coded is read. period: weights per kernel.
  WeightModel(Coder* coder, const std::int32_t* codes, std::int64_t cols, int period, int scale)
      : coder_(coder),
        codes_(codes),
        cols_(cols),
        period_(period),
        mean_(scale_value(scale)),
        limit_(largest_counted(scale)),
        step_((std::int64_t{1} << 26) / (mean_ * mean_ / 128 + mean_ / 2 + 1)),
        channel_sum_(static_cast<std::size_t>(cols / period),
                     static_cast<Sum>(first_channel_sum(scale))),
        tap_weights_(static_cast<std::size_t>(period)) {
    start_probabilities();
    start_taps();
  }

  // Codes row r: get(c) is what a writing coder writes for column c, put(c, x) takes the result.
  template <class Get, class Put>
  void code_row(std::int64_t r, Get get, Put put) {
    std::int64_t row_sum = 8 * mean_;
    int position = 0;
    std::int64_t channel = 0;
    for (std::int64_t c = 0; c < cols_; ++c) {
      const std::int64_t seen = r * period_ + position + 12;
      const std::int64_t expected = (row_sum / (c + 8)) * (channel_sum_[channel] / seen) / mean_;
      const Taps taps = neighbours(r, c, position);
      Taps& weights = tap_weights_[position];
      std::int64_t guess = 0;
      for (int t = 0; t < kTaps; ++t) guess += std::int64_t{weights[t]} * taps[t];
      guess >>= 12;

      const std::int32_t x = code(get(c), bucket_of(expected, kScales - 1), guess);
      put(c, x);

      const std::int32_t clipped = std::clamp(x, -limit_, limit_);
      const std::int64_t error = 256 * std::int64_t{clipped} - guess;
      for (int t = 0; t < kTaps; ++t) {
        const std::int64_t next = weights[t] + ((error * taps[t] * step_) >> 16);
        weights[t] = static_cast<std::int32_t>(
            std::clamp<std::int64_t>(next, -kLargestTapWeight, kLargestTapWeight));
      }
      const std::int64_t magnitude = 256 * std::int64_t{std::abs(clipped)};
      row_sum += magnitude;
      channel_sum_[channel] += static_cast<Sum>(magnitude);
      if (++position == period_) {
        position = 0;
        ++channel;
      }
    }
  }

 private:
  static constexpr int kTaps = 8;
  static constexpr int kScales = 32;
  static constexpr int kGuesses = 16;
  static constexpr int kUnary = 14;
  static constexpr int kLargestTapWeight = 1 << 22;  // 4.0: tap weights have 20 fractional bits
  using Taps = std::array<std::int32_t, kTaps>;

  static AdaptiveBit start(std::int64_t p16) { return AdaptiveBit::start(p16); }

  void start_probabilities() {
    for (int s = 0; s < kScales; ++s) {
      const std::int64_t e = s == 0 ? 10 : std::int64_t{s % 2 ? 20 : 30} << ((s - 1) / 2);
      for (auto& by_guess : magnitude_[s]) {
        by_guess.fill(start((e << 16) / (e + 600)));
        by_guess[0] = start((e << 16) / (e + 128));
      }
    }
    for (int g = 0; g < kGuesses; ++g) sign_[g] = start(g == 0 ? 32768 : 22000);
    exponent_.fill(start(32768));
  }

  // A quarter of the weight to the left in the kernel, a quarter of the one above.
  void start_taps() {
    int width = 1;
    while (width * width < period_) ++width;
    if (width * width != period_) width = period_;
    for (int i = 0; i < period_; ++i) {
      tap_weights_[i].fill(0);
      if (i % width > 0) tap_weights_[i][0] = 1 << 18;
      if (i >= width && width <= kTaps) tap_weights_[i][width - 1] = 1 << 18;
    }
  }

  Taps neighbours(std::int64_t r, std::int64_t c, int position) const {
    Taps taps{};
    const std::int32_t* here = codes_ + r * cols_ + c;
    if (period_ > 1) {
      const int taken = std::min(position, kTaps);
      for (int t = 0; t < taken; ++t) taps[t] = std::clamp(here[-1 - t], -limit_, limit_);
    } else {
      const int left = static_cast<int>(std::min<std::int64_t>(c, kTaps / 2));
      const int up = static_cast<int>(std::min<std::int64_t>(r, kTaps / 2));
      for (int t = 0; t < left; ++t) taps[t] = std::clamp(here[-1 - t], -limit_, limit_);
      for (int t = 0; t < up; ++t) {
        taps[kTaps / 2 + t] = std::clamp(here[-(t + 1) * cols_], -limit_, limit_);
      }
    }
    return taps;
  }

  std::int32_t code(std::int32_t x, int scale, std::int64_t guess) {
    const std::int32_t magnitude = std::abs(x);
    const bool guess_negative = guess < 0;
    const int near = bucket_of(guess_negative ? -guess : guess, kGuesses - 1);
    if (!bit(magnitude > 0, &magnitude_[scale][near][0])) return 0;
    const bool against = bit((x < 0) != guess_negative, &sign_[near]);
    auto& larger = magnitude_[scale][against && near > 0 ? kGuesses + near - 1 : near];
    std::int32_t m = 1;
    while (m < kUnary && bit(magnitude > m, &larger[m])) ++m;
    if (m == kUnary) m += escape(static_cast<std::uint32_t>(magnitude - kUnary));
    return against != guess_negative ? -m : m;
  }

  // Exp-Golomb: the number of binary digits of rest + 1, then the digits after the first.
  std::int32_t escape(std::uint32_t rest) {
    int digits = 0;
    while (digits < 30 && bit((rest + 1) >> (digits + 1) != 0, &exponent_[digits])) ++digits;
    std::uint32_t value = 1;
    for (int i = digits - 1; i >= 0; --i) {
      value = value << 1 | (coder_->code((rest + 1) >> i & 1, 1 << 15) ? 1u : 0u);
    }
    if (value - 1 + kUnary > static_cast<std::uint32_t>(kLargestCode)) {
      throw std::invalid_argument("coded weights: got a code of ±" +
                                  std::to_string(value - 1 + kUnary) + ", wanted at most ±2^30");
    }
    return static_cast<std::int32_t>(value - 1);
  }

  bool bit(bool value, AdaptiveBit* b) { return code_adaptive(coder_, value, b, rate_); }

  Coder* coder_;
  const std::int32_t* codes_;
  std::int64_t cols_;
  int period_;
  std::int64_t mean_;
  std::int32_t limit_;
  std::int64_t step_;  // of the LMS: 0.001 / variance
  std::vector<Sum> channel_sum_;
  std::vector<Taps> tap_weights_;
  const std::int64_t* rate_ = learning_rates().data();
  // [scale][guess: none, then agreeing with the sign, then opposing][question]
  std::array<std::array<std::array<AdaptiveBit, kUnary>, 2 * kGuesses>, kScales> magnitude_;
  std::array<AdaptiveBit, kGuesses> sign_;
  std::array<AdaptiveBit, 30> exponent_;
};

}  // namespace fitcompress
