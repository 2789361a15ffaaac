#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "storage/bit_stream.h"
#include "storage/blocks.h"
#include "storage/rans.h"
#include "storage/static_codec.h"
#include "storage/static_layout.h"

namespace fitcompress {
namespace {

constexpr std::size_t kHeader = 2;

[[noreturn]] void fail(const std::string& what) {
  throw std::invalid_argument("coded weights: " + what);
}

// What one decoding step needs to know of the low bits of a state.
struct Slot {
  std::uint16_t frequency;
  std::uint16_t offset;  // of the slot in its sequence's
  std::uint16_t sequence;
  std::uint16_t length;
};

struct DecodingTable {
  std::vector<Slot> slots;
  std::vector<std::uint64_t> sequences;  // eight symbols each, as bytes in memory
};

DecodingTable decoding_table(const SequenceDictionary& dictionary, int bits) {
  DecodingTable table;
  table.slots.reserve(std::size_t{1} << bits);
  for (std::size_t s = 0; s < dictionary.sequences.size(); ++s) {
    const Sequence& each = dictionary.sequences[s];
    std::uint64_t symbols;
    std::memcpy(&symbols, each.symbols.data(), sizeof symbols);
    table.sequences.push_back(symbols);
    for (std::uint32_t i = 0; i < each.frequency; ++i) {
      table.slots.push_back({static_cast<std::uint16_t>(each.frequency),
                             static_cast<std::uint16_t>(i), static_cast<std::uint16_t>(s),
                             each.length});
    }
  }
  return table;
}

std::uint32_t load16(const std::uint8_t* p) { return p[0] | std::uint32_t{p[1]} << 8; }

// Decodes `count` symbols from [p, end), which holds the states first; writes up to seven more.
// Returns where the words ended.
template <int kStates>
const std::uint8_t* decode_symbols(const DecodingTable& table, int bits, const std::uint8_t* p,
                                   const std::uint8_t* end, std::int8_t first_symbol,
                                   std::int8_t* out, std::int64_t count) {
  if (end - p < 4 * kStates) fail("a block is truncated");
  std::array<std::uint32_t, kStates> x;
  for (auto& state : x) {
    state = load16(p) | load16(p + 2) << 16;
    if (state < kSmallestState) fail("a block starts with an impossible state");
    p += 4;
  }
  const Slot* slots = table.slots.data();
  const std::uint64_t* sequences = table.sequences.data();
  const std::uint32_t mask = (1u << bits) - 1;
  std::int8_t* const last = out + count;
  // Without a check inside: a round takes at most kStates words and 8 kStates symbols.
  while (end - p >= 2 * kStates && last - out >= kLongestSequence * kStates) {
    for (int i = 0; i < kStates; ++i) {
      const Slot slot = slots[x[i] & mask];
      std::memcpy(out, &sequences[slot.sequence], kLongestSequence);
      out += slot.length;
      const std::uint32_t state = slot.frequency * (x[i] >> bits) + slot.offset;
      const bool low = state < kSmallestState;
      x[i] = low ? state << 16 | load16(p) : state;
      p += low ? 2 : 0;
    }
  }
  for (int i = 0; out < last; i = (i + 1) % kStates) {
    const Slot slot = slots[x[i] & mask];
    std::memcpy(out, &sequences[slot.sequence], kLongestSequence);
    out += slot.length;
    x[i] = slot.frequency * (x[i] >> bits) + slot.offset;
    if (x[i] < kSmallestState) {
      if (end - p < 2) fail("a block is truncated");
      x[i] = x[i] << 16 | load16(p);
      p += 2;
    }
  }
  for (; out > last; --out) {
    if (out[-1] != first_symbol) fail("the last sequence of a block goes on wrongly");
  }
  for (const std::uint32_t state : x) {
    if (state != kSmallestState) fail("a block does not end where its encoder began");
  }
  return p;
}

template <class Code>
void emit(const Code* codes, std::int64_t start, std::int64_t count, const WeightSink& sink) {
  if (sink.codes) {
    for (std::int64_t i = 0; i < count; ++i) sink.codes[start + i] = codes[i];
    return;
  }
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t row = (start + i) / sink.columns;
    const std::int64_t end = std::min(count, (row + 1) * sink.columns - start);
    const float scale = sink.scales[sink.scale_per_row ? row : 0];
    float* out = sink.values + start;
    for (; i < end; ++i) out[i] = static_cast<float>(codes[i]) * scale;
  }
}

void decode_block(const StaticLayout& layout, const DecodingTable& table, const std::uint8_t* bytes,
                  std::size_t size, std::int64_t start, std::int64_t count, std::int32_t largest,
                  int states, const WeightSink& sink) {
  // Kept from block to block: to map and unmap it each time would hold the other threads up.
  thread_local std::vector<std::int8_t> symbols;
  symbols.resize(static_cast<std::size_t>(kBlock) + kLongestSequence);
  const std::uint8_t* const end = bytes + size;
  const auto decode = states == 1 ? decode_symbols<1> : decode_symbols<kMostStates>;
  const std::uint8_t* p =
      decode(table, layout.bits(), bytes, end, layout.shares.symbols[0], symbols.data(), count);
  if (!layout.kind.has_extra_bits()) {
    if (p != end) fail("bytes follow the end of a block");
    emit(symbols.data(), start, count, sink);
    return;
  }
  std::unique_ptr<std::int32_t[]> codes(new std::int32_t[count]);
  BitReader extra(p, end);
  for (std::int64_t i = 0; i < count; ++i) {
    const int symbol = symbols[i];
    const int of_class = std::abs(symbol);
    const CodeClasses& classes = layout.kind.classes();
    const std::uint32_t magnitude =
        classes.first(of_class) + extra.get(classes.extra_bits(of_class));
    if (magnitude > static_cast<std::uint32_t>(largest)) {
      fail("got a code of ±" + std::to_string(magnitude) + ", wanted at most ±" +
           std::to_string(largest));
    }
    codes[i] =
        symbol < 0 ? -static_cast<std::int32_t>(magnitude) : static_cast<std::int32_t>(magnitude);
  }
  extra.finish();
  emit(codes.get(), start, count, sink);
}

}  // namespace

void check_static(std::size_t size, std::int64_t count) {
  if (count == 0) fail("got a stream of nothing, wanted codec 1");
  // At least the states of every block and one byte of every length, that of the shares among them.
  const auto blocks = static_cast<std::uint64_t>((count + kBlock - 1) / kBlock);
  if (size < kHeader + blocks * (4 * static_cast<std::uint64_t>(states_for(count)) + 1)) {
    fail("truncated, got " + std::to_string(size) + " bytes for " + std::to_string(count) +
         " weights");
  }
}

void decode_static(const std::uint8_t* bytes, std::size_t size, std::int64_t count,
                   std::int32_t largest, int threads, const WeightSink& sink) {
  StaticLayout layout = layout_of_flags(bytes[1]);
  const std::uint8_t* p = bytes + kHeader;
  const std::uint8_t* const end = bytes + size;
  const std::size_t share_bytes = take_length(&p, end);
  layout.shares = decode_shares(p, share_bytes, layout.kind.symmetric);
  p += share_bytes;
  const SymbolShares& shares = layout.shares;
  if (layout.limit() < static_cast<int>(shares.symbols.size())) {
    fail("got " + std::to_string(shares.symbols.size()) + " symbols, wanted at most " +
         std::to_string(layout.limit()));
  }
  const int widest = std::abs(shares.symbols.back());
  const int most = layout.kind.has_extra_bits() ? layout.kind.classes().largest() : largest;
  if (widest > most) {
    fail("got a symbol of ±" + std::to_string(widest) + ", wanted at most ±" +
         std::to_string(most));
  }
  const std::int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<const std::uint8_t*> starts(static_cast<std::size_t>(blocks) + 1, end);
  std::vector<std::size_t> lengths;
  for (std::int64_t b = 0; b + 1 < blocks; ++b) lengths.push_back(take_length(&p, end));
  starts[0] = p;
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    if (lengths[b] > static_cast<std::size_t>(end - starts[b])) fail("a block ends outside");
    starts[b + 1] = starts[b] + lengths[b];
  }
  layout.dictionary = build_dictionary(layout.shares, layout.limit(), layout.bits());
  const DecodingTable table = decoding_table(layout.dictionary, layout.bits());
  for_blocks(blocks, threads, [&](std::int64_t b) {
    const auto i = static_cast<std::size_t>(b);
    const std::int64_t start = b * kBlock;
    decode_block(layout, table, starts[i], static_cast<std::size_t>(starts[i + 1] - starts[i]),
                 start, std::min(kBlock, count - start), largest, states_for(count), sink);
  });
}

}  // namespace fitcompress
