// Binary range coder: a sequence of bits with given probabilities, as bytes.
//
// The bits seen so far are an interval [low, low + range) inside [0, 2^32), scaled up by whole
// bytes whenever range falls under 2^24. A bit with probability p/2^16 of being 1 takes the lower
// p/2^16 of it, or the rest. The end costs the fewest bytes whose zero-extension lies inside the
// last interval; the decoder knows which bytes those are, so it accepts exactly the streams that
// the encoder writes. Integers only: the bytes are the same on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fitcompress {

constexpr int kProbabilityBits = 16;
constexpr std::uint32_t kSmallestRange = 1u << 24;

// The last value of a stream: how many of its four bytes are stored, and the value.
struct Tail {
  int bytes;
  std::uint64_t value;
};

// The shortest zero-extended byte string inside [low, low + range), low taken modulo 2^32.
inline Tail shortest_tail(std::uint32_t low, std::uint32_t range) {
  for (int bytes = 0; bytes < 4; ++bytes) {
    const std::uint64_t unit = std::uint64_t{1} << (32 - 8 * bytes);
    const std::uint64_t value = (low + unit - 1) / unit * unit;
    if (value < std::uint64_t{low} + range) return {bytes, value};
  }
  return {4, low};
}

class RangeEncoder {
 public:
  explicit RangeEncoder(std::vector<std::uint8_t>* bytes) : bytes_(bytes), start_(bytes->size()) {}

  // Appends a bit whose probability of being 1 is p / 2^16, 0 < p < 2^16. Returns the bit.
  bool code(bool bit, std::uint32_t p) {
    const auto bound = static_cast<std::uint32_t>((std::uint64_t{range_} * p) >> kProbabilityBits);
    if (bit) {
      range_ = bound;
    } else {
      low_ += bound;
      range_ -= bound;
    }
    while (range_ < kSmallestRange) {
      shift();
      range_ <<= 8;
    }
    return bit;
  }

  // Writes what is left. No bit can follow.
  void finish() {
    if (low_ >> 32) carry();
    const Tail tail = shortest_tail(static_cast<std::uint32_t>(low_), range_);
    if (tail.value >> 32) carry();
    for (int i = 0; i < tail.bytes; ++i) {
      bytes_->push_back(static_cast<std::uint8_t>(tail.value >> (24 - 8 * i)));
    }
  }

 private:
  void shift() {
    if (low_ >> 32) carry();
    bytes_->push_back(static_cast<std::uint8_t>(low_ >> 24));
    low_ = (low_ << 8) & 0xFFFFFFFFu;
  }

  // Adds one to the bytes written so far. It ends before start_: the value stays below 2^32.
  void carry() {
    std::size_t i = bytes_->size();
    while (i > start_ && ++(*bytes_)[--i] == 0) {
    }
    low_ &= 0xFFFFFFFFu;
  }

  std::vector<std::uint8_t>* bytes_;
  std::size_t start_;
  std::uint64_t low_ = 0;
  std::uint32_t range_ = 0xFFFFFFFFu;
};

class RangeDecoder {
 public:
  RangeDecoder(const std::uint8_t* bytes, std::size_t size) : bytes_(bytes), size_(size) {
    for (int i = 0; i < 4; ++i) offset_ = offset_ << 8 | next();
    if (offset_ >= range_) throw std::invalid_argument("coded weights: no stream starts so");
  }

  // Reads the bit that was written with the probability p / 2^16 of being 1.
  bool code(bool /*unused*/, std::uint32_t p) {
    const auto bound = static_cast<std::uint32_t>((std::uint64_t{range_} * p) >> kProbabilityBits);
    const bool bit = offset_ < bound;
    if (bit) {
      range_ = bound;
    } else {
      low_ += bound;
      offset_ -= bound;
      range_ -= bound;
    }
    while (range_ < kSmallestRange) {
      offset_ = offset_ << 8 | next();
      low_ <<= 8;
      range_ <<= 8;
    }
    return bit;
  }

  // Throws unless the stream ends as the encoder ends it.
  void finish() const {
    const Tail tail = shortest_tail(low_, range_);
    const std::size_t wanted = position_ - 4 + static_cast<std::size_t>(tail.bytes);
    if (wanted != size_) {
      throw std::invalid_argument("coded weights: got " + std::to_string(size_) +
                                  " bytes after the header, wanted " + std::to_string(wanted));
    }
    if (offset_ != static_cast<std::uint32_t>(tail.value - low_)) {
      throw std::invalid_argument("coded weights: the last bytes do not end a stream");
    }
  }

 private:
  // Past the end there are zeros, but no more than the four that a window holds.
  std::uint32_t next() {
    const std::size_t i = position_++;
    if (i < size_) return bytes_[i];
    if (i >= size_ + 4) {
      throw std::invalid_argument("coded weights: truncated, got " + std::to_string(size_) +
                                  " bytes after the header, wanted more");
    }
    return 0;
  }

  const std::uint8_t* bytes_;
  std::size_t size_;
  std::size_t position_ = 0;
  std::uint32_t low_ = 0;
  std::uint32_t range_ = 0xFFFFFFFFu;
  std::uint32_t offset_ = 0;
};

}  // namespace fitcompress
