// How often each symbol occurs, to about its sampling error, in few bytes.
//
// A symbol is a signed byte, not -128, in the order 0, 1, -1, 2, -2, ... Kept of its count n is
// round(sqrt(n)), so an error of half a unit is one standard deviation of n: finer shares would
// cost more bytes than they save. Range-coded: differences to the mean of the magnitude before,
// and of a negative symbol to its positive twin, unless it is said to have the same share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fitcompress {

struct SymbolShares {
  std::vector<std::int8_t> symbols;  // those that occur, in order; not empty
  std::vector<std::uint32_t> roots;  // of their counts, 1 ... 2^16
};

// counts: of the symbols, [255] in order. At least one is positive, all are at most 2^32.
// symmetric: a symbol and its negative get the share of both together.
SymbolShares shares_of(const std::vector<std::uint64_t>& counts, bool symmetric);

// The place of a symbol in the order, 0 ... 254.
inline std::size_t order_of(int symbol) {
  return static_cast<std::size_t>(symbol > 0 ? 2 * symbol - 1 : -2 * symbol);
}

std::vector<std::uint8_t> encode_shares(const SymbolShares& shares, bool symmetric);

// Throws std::invalid_argument unless bytes are what encode_shares returns.
SymbolShares decode_shares(const std::uint8_t* bytes, std::size_t size, bool symmetric);

}  // namespace fitcompress
