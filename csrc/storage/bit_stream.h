// Bits one after another, the lowest of a byte first, and lengths of a few bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fitcompress {

class BitWriter {
 public:
  explicit BitWriter(std::vector<std::uint8_t>* bytes) : bytes_(bytes) {}

  // Appends the lowest `bits` of value, at most 32; the others are 0.
  void put(std::uint32_t value, int bits) {
    buffer_ |= std::uint64_t{value} << used_;
    for (used_ += bits; used_ >= 8; used_ -= 8) {
      bytes_->push_back(static_cast<std::uint8_t>(buffer_));
      buffer_ >>= 8;
    }
  }

  // Fills the last byte up with zeros.
  void finish() {
    if (used_ > 0) put(0, 8 - used_);
  }

 private:
  std::vector<std::uint8_t>* bytes_;
  std::uint64_t buffer_ = 0;
  int used_ = 0;
};

class BitReader {
 public:
  BitReader(const std::uint8_t* p, const std::uint8_t* end) : p_(p), end_(end) {}

  std::uint32_t get(int bits) {
    for (; held_ < bits; held_ += 8) {
      if (p_ == end_) throw std::invalid_argument("coded weights: extra bits are missing");
      buffer_ |= std::uint64_t{*p_++} << held_;
    }
    const auto value = static_cast<std::uint32_t>(buffer_ & ((std::uint64_t{1} << bits) - 1));
    buffer_ >>= bits;
    held_ -= bits;
    return value;
  }

  // Throws unless nothing but a last byte's zeros is left.
  void finish() const {
    if (p_ != end_ || buffer_ != 0) {
      throw std::invalid_argument("coded weights: bits follow the last code");
    }
  }

 private:
  const std::uint8_t* p_;
  const std::uint8_t* end_;
  std::uint64_t buffer_ = 0;
  int held_ = 0;
};

// Seven bits a byte, the lowest first; all bytes but the last have the eighth set.
inline void append_length(std::size_t length, std::vector<std::uint8_t>* bytes) {
  for (; length >= 128; length >>= 7) bytes->push_back(static_cast<std::uint8_t>(length | 128));
  bytes->push_back(static_cast<std::uint8_t>(length));
}

// Reads a length of bytes that follow it, directly or later, and end before `end`.
inline std::size_t take_length(const std::uint8_t** p, const std::uint8_t* end) {
  std::size_t length = 0;
  for (int shift = 0; *p != end && shift < 42; shift += 7) {
    const std::uint8_t byte = *(*p)++;
    length |= static_cast<std::size_t>(byte & 127) << shift;
    if (byte >= 128) continue;
    if ((byte == 0 && shift > 0) || length > static_cast<std::size_t>(end - *p)) break;
    return length;
  }
  throw std::invalid_argument("coded weights: a length is impossible");
}

}  // namespace fitcompress
