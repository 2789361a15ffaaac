// Weight codes as sequences of a static dictionary, entropy-coded: decoded at memory speed.
//
// What it costs is the order-0 entropy of codes within a byte and less than a per cent; unlike the
// adaptive codec it knows nothing of neighbours, rows and columns, and is ten times as fast or
// more. Blocks of 2^18 weights are independent, so that threads can share the work. The stream,
// section 4b of docs/format.md:
//
//   codec 2; flags (static_layout.h); bytes of the shares, shares; bytes of every block but the
//   last; blocks.
//
// A block: the states, little-endian, the words that they take up, and with classes the extra
// bits of each code. static_coder_reference.py is the twin in Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fitcompress {

constexpr std::uint8_t kStaticCodec = 2;

// codes: `count` of them, at least one, each within ±2^30.
std::vector<std::uint8_t> encode_static(const std::int32_t* codes, std::int64_t count, int threads);

// Where decoded weights go: as codes, or times the scale of their row as floats.
struct WeightSink {
  std::int32_t* codes;  // or null
  float* values;        // or null
  const float* scales;  // one, or one a row
  bool scale_per_row;
  std::int64_t columns;  // of a row
};

// Throws std::invalid_argument where so few bytes cannot hold so many codes.
void check_static(std::size_t size, std::int64_t count);

// Decodes what check_static has let through. Throws std::invalid_argument unless the stream has
// so many codes, and none beyond ±largest.
void decode_static(const std::uint8_t* bytes, std::size_t size, std::int64_t count,
                   std::int32_t largest, int threads, const WeightSink& sink);

}  // namespace fitcompress
