// Weight codes under probabilities that adapt to rows, columns and neighbours: the smallest files.
//
// The stream: codec 1, scale byte, weights per kernel, range-coded questions of WeightModel. A
// matrix of zeros, or of nothing, ends after a scale byte of 0. Section 4a of docs/format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fitcompress {

constexpr std::uint8_t kAdaptiveCodec = 1;

// codes: [rows, cols], C-contiguous, each within ±2^30.
std::vector<std::uint8_t> encode_adaptive(const std::int32_t* codes, std::int64_t rows,
                                          std::int64_t cols);

// Throws std::invalid_argument where the first bytes, at least two, or their number cannot belong
// to such a matrix, so that memory for it need not be reserved.
void check_adaptive(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols);

// Decodes what check_adaptive has let through. Throws std::invalid_argument unless bytes are what
// encode_adaptive returns for such a matrix.
void decode_adaptive(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                     std::int64_t cols, std::int32_t* codes);

}  // namespace fitcompress
