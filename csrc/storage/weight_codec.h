// Integer codes of a quantized weight matrix as bytes, and back, without loss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fitcompress {

// codes: [rows, cols], C-contiguous, each within ±2^30.
std::vector<std::uint8_t> encode_weights(const std::int32_t* codes, std::int64_t rows,
                                         std::int64_t cols);

// Throws std::invalid_argument where the first bytes or their number cannot belong to such a
// matrix, so that memory for it need not be reserved.
void check_stream(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                  std::int64_t cols);

// Throws std::invalid_argument unless bytes are what encode_weights returns for such a matrix.
void decode_weights(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols, std::int32_t* codes);

}  // namespace fitcompress
