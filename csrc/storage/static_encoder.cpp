#include <algorithm>
#include <array>
#include <cstdlib>

#include "storage/bit_stream.h"
#include "storage/blocks.h"
#include "storage/rans.h"
#include "storage/static_codec.h"
#include "storage/static_layout.h"

namespace fitcompress {
namespace {

// One block.
std::vector<std::uint8_t> encode_block(const StaticLayout& layout, const std::int8_t* symbols,
                                       const std::int32_t* codes, std::int64_t count,
                                       std::size_t lanes) {
  std::array<std::int32_t, 256> index{};
  const auto width = static_cast<std::int32_t>(layout.shares.symbols.size());
  for (std::int32_t i = 0; i < width; ++i) {
    index[static_cast<std::uint8_t>(layout.shares.symbols[static_cast<std::size_t>(i)])] = i;
  }
  std::vector<std::uint8_t> found;
  found.reserve(static_cast<std::size_t>(count) / 2);
  const std::int32_t* next = layout.dictionary.next.data();
  std::int32_t node = 0;
  const auto step = [&](std::int32_t i) {
    node = next[node * width + i];
    if (node < 0) {
      found.push_back(static_cast<std::uint8_t>(-1 - node));
      node = 0;
    }
  };
  for (std::int64_t i = 0; i < count; ++i) step(index[static_cast<std::uint8_t>(symbols[i])]);
  while (node != 0) step(0);  // the last sequence goes on with the first symbol

  std::vector<std::uint16_t> words;
  words.reserve(found.size());
  std::array<std::uint32_t, kMostStates> state;
  state.fill(kSmallestState);
  for (std::size_t i = found.size(); i-- > 0;) {
    const Sequence& sequence = layout.dictionary.sequences[found[i]];
    std::uint32_t& x = state[i & (lanes - 1)];
    x = put_symbol(x, sequence.frequency, sequence.first, layout.bits(),
                   [&](std::uint16_t word) { words.push_back(word); });
  }
  std::vector<std::uint8_t> bytes(4 * lanes + 2 * words.size());
  std::uint8_t* out = bytes.data();
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < 4; ++i) *out++ = static_cast<std::uint8_t>(state[lane] >> (8 * i));
  }
  for (std::size_t i = words.size(); i-- > 0;) {
    *out++ = static_cast<std::uint8_t>(words[i]);
    *out++ = static_cast<std::uint8_t>(words[i] >> 8);
  }
  if (layout.kind.has_extra_bits()) {
    const CodeClasses& classes = layout.kind.classes();
    BitWriter extra(&bytes);
    for (std::int64_t i = 0; i < count; ++i) {
      const int of_class = std::abs(symbols[i]);
      const auto magnitude = static_cast<std::uint32_t>(std::abs(codes[i]));
      extra.put(magnitude - classes.first(of_class), classes.extra_bits(of_class));
    }
    extra.finish();
  }
  return bytes;
}

}  // namespace

std::vector<std::uint8_t> encode_static(const std::int32_t* codes, std::int64_t count,
                                        int threads) {
  std::uint32_t widest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    widest |= static_cast<std::uint32_t>(std::abs(codes[i]));
  }
  const SymbolKind fine{widest > 127 ? 1 : 0, false};
  std::vector<std::int8_t> symbols(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    symbols[static_cast<std::size_t>(i)] = fine.symbol(codes[i]);
  }
  const StaticLayout layout = choose_layout(fine, symbols);
  if (layout.kind.number != fine.number) {
    const auto map = coarser(fine, layout.kind);
    for (auto& symbol : symbols) symbol = map[static_cast<std::uint8_t>(symbol)];
  }
  const std::vector<std::uint8_t> shares = encode_shares(layout.shares, layout.kind.symmetric);
  std::vector<std::uint8_t> bytes{kStaticCodec, layout.flags()};
  append_length(shares.size(), &bytes);
  bytes.insert(bytes.end(), shares.begin(), shares.end());

  const std::int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<std::vector<std::uint8_t>> parts(static_cast<std::size_t>(blocks));
  for_blocks(blocks, threads, [&](std::int64_t b) {
    const std::int64_t start = b * kBlock;
    parts[static_cast<std::size_t>(b)] =
        encode_block(layout, symbols.data() + start, codes + start, std::min(kBlock, count - start),
                     static_cast<std::size_t>(states_for(count)));
  });
  for (std::size_t b = 0; b + 1 < parts.size(); ++b) append_length(parts[b].size(), &bytes);
  for (const auto& part : parts) bytes.insert(bytes.end(), part.begin(), part.end());
  return bytes;
}

}  // namespace fitcompress
