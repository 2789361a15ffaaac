#include "storage/static_layout.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace fitcompress {
namespace {

using Counts = std::vector<std::uint64_t>;  // of the symbols, [255] in order

Counts count_symbols(const std::vector<std::int8_t>& symbols) {
  std::array<std::array<std::uint64_t, 256>, 4> partial{};
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    ++partial[i & 3][static_cast<std::uint8_t>(symbols[i])];
  }
  Counts counts(255);
  for (int s = -127; s <= 127; ++s) {
    for (const auto& part : partial) counts[order_of(s)] += part[static_cast<std::uint8_t>(s)];
  }
  return counts;
}

// Bits for the counted symbols under their own rounded shares, with those shares.
double entropy_bits(const SymbolKind& kind, const Counts& counts, const SymbolShares& shares) {
  double sum = 0;
  for (const double root : shares.roots) sum += root * root;
  double bits = 8.0 * static_cast<double>(encode_shares(shares, kind.symmetric).size());
  for (std::size_t i = 0; i < shares.symbols.size(); ++i) {
    const double root = shares.roots[i];
    const int symbol = shares.symbols[i];
    bits += static_cast<double>(counts[order_of(symbol)]) *
            (std::log2(sum / (root * root)) + kind.extra_bits(symbol));
  }
  return bits;
}

// What slower decoding must save in large matrices; in small ones nobody would notice.
double required_saving(const Counts& counts) {
  std::uint64_t total = 0;
  for (const std::uint64_t count : counts) total += count;
  return total < static_cast<std::uint64_t>(kOneState) ? 1.0 : 0.995;
}

// Picks what the symbols are. Classes are slower to decode.
void choose_kind(const SymbolKind& fine, const Counts& counts, double saving,
                 StaticLayout* layout) {
  double best_cost = std::numeric_limits<double>::infinity();
  for (int number = fine.number; number < static_cast<int>(kKinds.size()); ++number) {
    // Only classes that are unions of the fine ones can be told from their counts.
    if (fine.has_extra_bits() && kKinds[number].split_bits > fine.classes().split_bits) continue;
    for (const bool symmetric : {false, true}) {
      const SymbolKind kind{number, symmetric};
      const auto map = coarser(fine, kind);
      Counts merged(counts.size());
      for (int s = -127; s <= 127; ++s) {
        const std::uint64_t count = counts[order_of(s)];
        if (count > 0) merged[order_of(map[static_cast<std::uint8_t>(s)])] += count;
      }
      SymbolShares shares = shares_of(merged, symmetric);
      const double cost = entropy_bits(kind, merged, shares);
      if (cost < (number > 0 && layout->kind.number == 0 ? saving : 1.0) * best_cost) {
        best_cost = cost;
        layout->kind = kind;
        layout->shares = std::move(shares);
      }
    }
  }
}

// Bits a symbol that a dictionary needs, were the symbols independent of each other.
double expected_bits(const SequenceDictionary& dictionary, int bits) {
  double cost = 0;
  double length = 0;
  for (const Sequence& each : dictionary.sequences) {
    const double p = each.probability;
    cost += p * (bits - std::log2(static_cast<double>(each.frequency)));
    length += p * each.length;
  }
  return cost / length;
}

// Picks the number of sequences and the bits of their frequencies. Larger tables and shorter
// sequences decode more slowly.
void choose_dictionary(double saving, StaticLayout* layout) {
  double best_cost = std::numeric_limits<double>::infinity();
  for (std::size_t b = 0; b < kBits.size(); ++b) {
    for (std::size_t l = 0; l < kLimits.size(); ++l) {
      if (kLimits[l] < static_cast<int>(layout->shares.symbols.size())) continue;
      SequenceDictionary dictionary = build_dictionary(layout->shares, kLimits[l], kBits[b]);
      const double cost = expected_bits(dictionary, kBits[b]);
      if (cost < saving * best_cost) {
        best_cost = cost;
        layout->bits_choice = b;
        layout->limit_choice = l;
        layout->dictionary = std::move(dictionary);
      }
    }
  }
}

}  // namespace

std::array<std::int8_t, 256> coarser(const SymbolKind& fine, const SymbolKind& coarse) {
  std::array<std::int8_t, 256> result{};
  for (int s = -127; s <= 127; ++s) {
    std::int32_t code = s;
    if (fine.has_extra_bits()) {
      if (std::abs(s) > fine.classes().largest()) continue;
      code = static_cast<std::int32_t>(fine.classes().first(std::abs(s)));
      if (s < 0) code = -code;
    }
    result[static_cast<std::uint8_t>(s)] = coarse.symbol(code);
  }
  return result;
}

StaticLayout choose_layout(const SymbolKind& fine, const std::vector<std::int8_t>& symbols) {
  StaticLayout layout{};
  const Counts counts = count_symbols(symbols);
  const double saving = required_saving(counts);
  choose_kind(fine, counts, saving, &layout);
  choose_dictionary(saving, &layout);
  return layout;
}

StaticLayout layout_of_flags(std::uint8_t flags) {
  StaticLayout layout{};
  layout.bits_choice = flags & 1u;
  layout.limit_choice = flags >> 1 & 3u;
  layout.kind = {flags >> 4, (flags & 8u) != 0};
  if (layout.limit_choice >= kLimits.size() ||
      layout.kind.number >= static_cast<int>(kKinds.size())) {
    throw std::invalid_argument("coded weights: got flags " + std::to_string(flags) +
                                ", which mean nothing");
  }
  return layout;
}

}  // namespace fitcompress
