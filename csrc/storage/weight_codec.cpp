#include "storage/weight_codec.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "storage/adaptive_codec.h"
#include "storage/static_codec.h"
#include "storage/weight_model.h"

namespace fitcompress {
namespace {

std::int64_t checked_count(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kMost = std::int64_t{1} << 32;
  if (rows < 0 || cols < 0 || (cols > 0 && rows > kMost / cols) || std::max(rows, cols) > kMost) {
    throw std::invalid_argument("shape: got (" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "), wanted at most 2^32 weights");
  }
  return rows * cols;
}

// Whether every code is 0, after a check of all.
bool only_zeros(const std::int32_t* codes, std::int64_t count) {
  std::int32_t any = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (codes[i] > kLargestCode || codes[i] < -kLargestCode) {
      throw std::invalid_argument("codes: got " + std::to_string(codes[i]) + " at flat index " +
                                  std::to_string(i) + ", wanted at most ±2^30");
    }
    any |= codes[i];
  }
  return any == 0;
}

void check_largest(const std::int32_t* codes, std::int64_t count, std::int32_t largest) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::abs(codes[i]) > largest) {
      throw std::invalid_argument("coded weights: got a code of " + std::to_string(codes[i]) +
                                  ", wanted at most ±" + std::to_string(largest));
    }
  }
}

}  // namespace

std::vector<std::uint8_t> encode_weights(const std::int32_t* codes, std::int64_t rows,
                                         std::int64_t cols, Coding coding, int threads) {
  const std::int64_t count = checked_count(rows, cols);
  if (only_zeros(codes, count) || coding == Coding::kAdaptive) {
    return encode_adaptive(codes, rows, cols);
  }
  std::vector<std::uint8_t> fast = encode_static(codes, count, threads);
  if (coding == Coding::kStatic) return fast;
  std::vector<std::uint8_t> small = encode_adaptive(codes, rows, cols);
  return small.size() < fast.size() ? small : fast;
}

void check_stream(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                  std::int64_t cols) {
  const std::int64_t count = checked_count(rows, cols);
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("coded weights: " + what);
  };
  if (size < 2) fail("got " + std::to_string(size) + " bytes, wanted at least 2");
  if (bytes[0] == kAdaptiveCodec) {
    check_adaptive(bytes, size, rows, cols);
  } else if (bytes[0] == kStaticCodec) {
    check_static(size, count);
  } else {
    fail("got codec " + std::to_string(bytes[0]) + ", wanted 1 or 2");
  }
}

void decode_weights(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols, std::int32_t largest, int threads, std::int32_t* codes) {
  check_stream(bytes, size, rows, cols);
  if (bytes[0] == kStaticCodec) {
    decode_static(bytes, size, rows * cols, largest, threads,
                  {codes, nullptr, nullptr, false, cols});
    return;
  }
  decode_adaptive(bytes, size, rows, cols, codes);
  check_largest(codes, rows * cols, largest);
}

void decode_values(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                   std::int64_t cols, std::int32_t largest, int threads, const float* scales,
                   bool scale_per_row, float* values) {
  check_stream(bytes, size, rows, cols);
  if (bytes[0] == kStaticCodec) {
    decode_static(bytes, size, rows * cols, largest, threads,
                  {nullptr, values, scales, scale_per_row, cols});
    return;
  }
  // The codes take the place of the values: a second matrix would double the memory.
  auto* codes = reinterpret_cast<std::int32_t*>(values);
  decode_adaptive(bytes, size, rows, cols, codes);
  check_largest(codes, rows * cols, largest);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float scale = scales[scale_per_row ? r : 0];
    for (std::int64_t i = r * cols; i < (r + 1) * cols; ++i) {
      std::int32_t code;
      std::memcpy(&code, values + i, sizeof code);
      values[i] = static_cast<float>(code) * scale;
    }
  }
}

}  // namespace fitcompress
