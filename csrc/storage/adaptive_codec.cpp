// The stream: codec number, scale byte, weights per kernel, range-coded questions of WeightModel.
// A matrix of zeros, or of nothing, ends after a scale byte of 0.
#include "storage/adaptive_codec.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "storage/range_coder.h"
#include "storage/weight_model.h"

namespace fitcompress {
namespace {

constexpr std::size_t kHeader = 3;
// A question keeps at least 32/2^16 of the interval from the likelier answer: 7e-4 bit a weight.
constexpr std::int64_t kMostWeightsPerByte = 12000;
// Kernel sizes worth trying, and the number of weights to try them on.
constexpr int kPeriods[] = {9, 1, 25, 49, 3, 5, 7, 4, 16, 27};
constexpr std::int64_t kSample = 1 << 16;

// The scale byte of a matrix: its mean magnitude rounded down; 0 where every code is 0.
int scale_of(const std::int32_t* codes, std::int64_t count) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += std::abs(codes[i]);
  if (sum == 0) return 0;
  const std::int64_t mean = sum / count * 256 + sum % count * 256 / count;
  int scale = 1;
  while (scale < kLargestScale && scale_value(scale + 1) <= mean) ++scale;
  return scale;
}

void append(const std::int32_t* codes, std::int64_t rows, std::int64_t cols, int period, int scale,
            std::vector<std::uint8_t>* bytes) {
  RangeEncoder coder(bytes);
  WeightModel<RangeEncoder> model(&coder, codes, cols, period, scale);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int32_t* row = codes + r * cols;
    model.code_row(r, [row](std::int64_t c) { return row[c]; }, [](std::int64_t, std::int32_t) {});
  }
  coder.finish();
}

template <class Sum>
void take(RangeDecoder* coder, std::int64_t rows, std::int64_t cols, int period, int scale,
          std::int32_t* codes) {
  WeightModel<RangeDecoder, Sum> model(coder, codes, cols, period, scale);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int32_t* row = codes + r * cols;
    model.code_row(
        r, [](std::int64_t) { return 0; }, [row](std::int64_t c, std::int32_t x) { row[c] = x; });
  }
}

// The kernel size under which the first rows become shortest.
int best_period(const std::int32_t* codes, std::int64_t rows, std::int64_t cols, int scale) {
  const std::int64_t some = std::clamp<std::int64_t>(kSample / cols, 1, rows);
  int best = 1;
  std::size_t best_size = std::numeric_limits<std::size_t>::max();
  for (const int period : kPeriods) {
    if (cols % period != 0) continue;
    std::vector<std::uint8_t> bytes;
    append(codes, some, cols, period, scale, &bytes);
    if (bytes.size() < best_size) {
      best = period;
      best_size = bytes.size();
    }
  }
  return best;
}

}  // namespace

std::vector<std::uint8_t> encode_adaptive(const std::int32_t* codes, std::int64_t rows,
                                          std::int64_t cols) {
  const int scale = scale_of(codes, rows * cols);
  std::vector<std::uint8_t> bytes{kAdaptiveCodec, static_cast<std::uint8_t>(scale)};
  if (scale == 0) return bytes;
  const int period = best_period(codes, rows, cols, scale);
  bytes.push_back(static_cast<std::uint8_t>(period));
  append(codes, rows, cols, period, scale, &bytes);
  return bytes;
}

void check_adaptive(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("coded weights: " + what);
  };
  const std::int64_t count = rows * cols;
  const int scale = bytes[1];
  if (scale == 0) {
    if (size != 2) fail("got " + std::to_string(size) + " bytes of zeros, wanted 2");
    return;
  }
  if (scale > kLargestScale || count == 0) {
    fail("got scale " + std::to_string(scale) + " for " + std::to_string(count) +
         " weights, wanted at most " + std::to_string(count == 0 ? 0 : kLargestScale));
  }
  if (size < kHeader) fail("got 2 bytes, wanted at least 3");
  const int period = bytes[2];
  if (period < 1 || period > kLargestPeriod || cols % period != 0) {
    fail("got kernels of " + std::to_string(period) + " weights, wanted a divisor of " +
         std::to_string(cols) + " up to " + std::to_string(kLargestPeriod));
  }
  const auto most = static_cast<std::int64_t>(size) * kMostWeightsPerByte + 8 * kMostWeightsPerByte;
  if (count > most) {
    fail("truncated, got " + std::to_string(size) + " bytes for " + std::to_string(count) +
         " weights");
  }
}

void decode_adaptive(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                     std::int64_t cols, std::int32_t* codes) {
  if (bytes[1] == 0) {
    std::fill(codes, codes + rows * cols, 0);
    return;
  }
  RangeDecoder coder(bytes + kHeader, size - kHeader);
  const int scale = bytes[1], period = bytes[2];
  if (sums_are_small(rows, period, scale)) {
    take<std::int32_t>(&coder, rows, cols, period, scale, codes);
  } else {
    take<std::int64_t>(&coder, rows, cols, period, scale, codes);
  }
  coder.finish();
}

}  // namespace fitcompress
