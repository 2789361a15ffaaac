// Sequences of up to eight symbols that are about equally likely, and their frequencies.
//
// A Tunstall tree: from one leaf per symbol on, the likeliest leaf becomes an inner node with a
// child for every symbol, as long as there are at most `limit` leaves. Every leaf is a sequence,
// and any text is a concatenation of leaves in exactly one way. Frequencies are products of the
// symbols' shares, rounded to 2^-bits: since leaves are about equally likely, that rounding costs
// next to nothing even at 12 bits, and one decoding step yields log2(limit)/entropy weights.
// Integers only: encoder and decoder build the same tree on every machine.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "storage/symbol_shares.h"

namespace fitcompress {

constexpr int kLongestSequence = 8;

struct Sequence {
  std::array<std::int8_t, kLongestSequence> symbols;  // zeros behind the end
  std::uint8_t length;
  std::uint32_t probability;  // of 2^31
  std::uint32_t frequency;    // of 2^bits, at least 1
  std::uint32_t first;        // sum of the frequencies before
};

struct SequenceDictionary {
  std::vector<Sequence> sequences;
  // next[node · symbols + index]: the node after a symbol, or -1 - the sequence that it ends.
  std::vector<std::int32_t> next;
};

// limit: 1 ... 256 and at least the number of symbols. bits: 12 ... 15.
SequenceDictionary build_dictionary(const SymbolShares& shares, int limit, int bits);

}  // namespace fitcompress
