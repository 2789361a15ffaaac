// Classes of codes: a symbol that fits a byte, and extra bits that say which code of the class.
//
// With p plain bits, magnitudes below 2^p are their own class. Above, every octave is 2^s classes,
// 2^p + 2^s (o - p) + h for o = floor(log2 |k|) and the s binary digits h behind its first; the
// o - s digits that follow are the extra bits. The class has the sign of the code. It is for codes
// beyond a byte, and where a share for each of many rare codes would take more than it saves.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fitcompress {

struct CodeClasses {
  int plain_bits;  // p, at least s
  int split_bits;  // s

  std::uint32_t plain() const { return 1u << plain_bits; }

  // Of the class of magnitude 2^30.
  int largest() const { return class_of(1 << 30); }

  // How many extra bits a class has, by its magnitude.
  int extra_bits(int magnitude_class) const {
    const auto c = static_cast<std::uint32_t>(magnitude_class);
    if (c < plain()) return 0;
    return plain_bits - split_bits + static_cast<int>((c - plain()) >> split_bits);
  }

  // The smallest magnitude of a class.
  std::uint32_t first(int magnitude_class) const {
    const auto c = static_cast<std::uint32_t>(magnitude_class);
    if (c < plain()) return c;
    const std::uint32_t splits = 1u << split_bits;
    return (splits + ((c - plain()) & (splits - 1))) << extra_bits(magnitude_class);
  }

  std::int8_t class_of(std::int32_t code) const {
    const auto magnitude = static_cast<std::uint32_t>(std::abs(code));
    std::uint32_t result = magnitude;
    if (magnitude >= plain()) {
      int octave = plain_bits;
      while (magnitude >> (octave + 1)) ++octave;
      const std::uint32_t splits = 1u << split_bits;
      const std::uint32_t h = magnitude >> (octave - split_bits) & (splits - 1);
      result = plain() + (static_cast<std::uint32_t>(octave - plain_bits) << split_bits) + h;
    }
    const auto signless = static_cast<int>(result);
    return static_cast<std::int8_t>(code < 0 ? -signless : signless);
  }
};

}  // namespace fitcompress
