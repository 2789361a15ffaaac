// What all blocks of a static stream have in common: the symbols, their shares, the dictionary.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "storage/code_classes.h"
#include "storage/sequence_dictionary.h"
#include "storage/symbol_shares.h"

namespace fitcompress {

constexpr std::int64_t kBlock = std::int64_t{1} << 18;     // weights
constexpr std::int64_t kOneState = std::int64_t{1} << 15;  // weights below which one must do
constexpr int kMostStates = 4;
constexpr std::array<int, 3> kLimits = {256, 64, 16};  // of sequences
constexpr std::array<int, 2> kBits = {12, 15};         // of frequencies
// What symbols may be: codes, or classes with so many plain and split bits.
constexpr std::array<CodeClasses, 10> kKinds = {
    {{0, 0}, {6, 1}, {5, 1}, {4, 1}, {3, 1}, {2, 1}, {1, 1}, {4, 2}, {3, 2}, {2, 2}}};

// What the symbols are: codes within a byte, or classes of codes with extra bits.
struct SymbolKind {
  int number;      // in kKinds
  bool symmetric;  // shares

  const CodeClasses& classes() const { return kKinds[static_cast<std::size_t>(number)]; }
  bool has_extra_bits() const { return number > 0; }
  std::int8_t symbol(std::int32_t code) const {
    return has_extra_bits() ? classes().class_of(code) : static_cast<std::int8_t>(code);
  }
  int extra_bits(int symbol) const {
    return has_extra_bits() ? classes().extra_bits(std::abs(symbol)) : 0;
  }
};

struct StaticLayout {
  SymbolKind kind;
  std::size_t bits_choice;   // in kBits
  std::size_t limit_choice;  // in kLimits
  SymbolShares shares;
  SequenceDictionary dictionary;

  int bits() const { return kBits[bits_choice]; }
  int limit() const { return kLimits[limit_choice]; }
  std::uint8_t flags() const {
    return static_cast<std::uint8_t>(bits_choice | limit_choice << 1 | (kind.symmetric ? 8u : 0u) |
                                     static_cast<unsigned>(kind.number) << 4);
  }
};

// How many states the blocks of a matrix of so many weights have.
inline int states_for(std::int64_t count) { return count < kOneState ? 1 : kMostStates; }

// symbols: of kind 1, if any code is beyond a byte, else of kind 0, as `fine` says; at least one.
StaticLayout choose_layout(const SymbolKind& fine, const std::vector<std::int8_t>& symbols);

// Turns symbols of one kind into symbols of a coarser one.
std::array<std::int8_t, 256> coarser(const SymbolKind& fine, const SymbolKind& coarse);

// The flags of a layout: bit 0 for bits, 1 and 2 for the limit, 3 for symmetric shares, then the
// kind. Throws std::invalid_argument where they mean nothing; shares and dictionary stay empty.
StaticLayout layout_of_flags(std::uint8_t flags);

}  // namespace fitcompress
