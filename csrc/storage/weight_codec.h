// Integer codes of a quantized weight matrix as bytes, and back, without loss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fitcompress {

enum class Coding {
  kSmallest,  // whichever makes the fewest bytes, of equals the static one
  kAdaptive,
  kStatic,  // decoded at memory speed; only zeros are left to the adaptive one
};

// codes: [rows, cols], C-contiguous, each within ±2^30. The bytes do not depend on the threads.
std::vector<std::uint8_t> encode_weights(const std::int32_t* codes, std::int64_t rows,
                                         std::int64_t cols, Coding coding, int threads);

// Throws std::invalid_argument where the first bytes or their number cannot belong to such a
// matrix, so that memory for it need not be reserved.
void check_stream(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                  std::int64_t cols);

// Throws std::invalid_argument unless bytes are a stream of such a matrix, no code of it beyond
// ±largest.
void decode_weights(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols, std::int32_t largest, int threads, std::int32_t* codes);

// The same, and float(code) times the scale of its row, or the only scale, rounded once.
void decode_values(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                   std::int64_t cols, std::int32_t largest, int threads, const float* scales,
                   bool scale_per_row, float* values);

}  // namespace fitcompress
