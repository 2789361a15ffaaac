// Sums per (cell, class) on the CPU.
//
// A task owns a chunk of the weights and a table of slots. Blocks of kBlock weights go through
// loops that vectorise (x, the cell, the class's bin, four float64 terms, all in the first-level
// cache) and then through a scalar loop: one lookup of the class and one 32-byte read-add-write of
// the slot. Bound: the vector instructions of the codes, about 3 a grid and 16 weights (steps: one
// division), and that loop.
#include "distortion/slots.h"

#include <algorithm>
#include <cmath>

#include "distortion/scale_units.h"

namespace fitcompress {
namespace {

constexpr int64_t kBlock = 256;

struct Block {
  float weight[kBlock], x[kBlock], code[kBlock], range[kBlock];
  double inverse_range[kBlock], squared_range[kBlock];
  uint32_t key[kBlock], bin[kBlock];
  int32_t cell[kBlock];
  uint32_t slot[kBlock];
  alignas(64) double terms[4 * kBlock];
};

// Sets the scales of the weights [begin, end). filled: the unit whose scales fill the whole block
// since the last call, or -1.
template <class T>
FITCOMPRESS_INLINE void set_scales(const Layer<T>& layer, int64_t begin, int64_t end,
                                   int64_t* filled, Block* block) {
  for_each_run(*layer.shape, begin, end,
               [&](int64_t unit, int64_t first, int64_t last) __attribute__((always_inline)) {
                 const bool whole = last - first == kBlock;
                 if (whole && *filled == unit) return;
                 *filled = whole ? unit : -1;
                 // Of a unit of zeros, every code is 0 because x = 0/∞.
                 const double range = layer.range[unit];
                 const float divisor = range > 0 ? layer.range[unit] : INFINITY;
                 const double inverse = range > 0 ? 1.0 / range : 0.0;
                 for (int64_t j = first - begin; j < last - begin; ++j) {
                   block->range[j] = divisor;
                   block->inverse_range[j] = inverse;
                   block->squared_range[j] = range * range;
                 }
               });
}

// Weights and x, which is 0 where the block is not full.
template <class T>
FITCOMPRESS_INLINE void load(const Layer<T>& layer, bool steps, int64_t begin, int64_t count,
                             Block* block) {
  for (int64_t j = 0; j < count; ++j) {
    const float w = to_float(layer.weight[begin + j]);
    block->weight[j] = w;
    block->x[j] = w < 0.0f ? -w : w;
  }
  if (!steps) {
    for (int64_t j = 0; j < count; ++j) block->x[j] /= block->range[j];
  }
  for (int64_t j = count; j < round_up(count, 16); ++j) block->x[j] = 0.0f;
}

// Whether any x is in [first, last).
FITCOMPRESS_INLINE bool any_between(const float* x, int64_t count, float first, float last) {
  int32_t between = 0;
  for (int64_t j = 0; j < count; ++j) between |= x[j] >= first && x[j] < last ? 1 : 0;
  return between != 0;
}

// What a weight adds to the four numbers of its slot.
FITCOMPRESS_INLINE void set_terms(const float* fisher, double spacing, int64_t count,
                                  Block* block) {
  for (int64_t j = 0; j < count; ++j) {
    const double w = block->weight[j];
    const double magnitude = w < 0.0 ? -w : w;
    const double d = magnitude * block->inverse_range[j] - block->code[j] * spacing;
    const double f =
        fisher == nullptr ? block->squared_range[j] : fisher[j] * block->squared_range[j];
    const double fd = f * d;
    block->terms[4 * j] = f;
    block->terms[4 * j + 1] = fd;
    block->terms[4 * j + 2] = fd * d;
    block->terms[4 * j + 3] = w < 0.0 ? kNegative : 1.0;
  }
}

// Where the terms of each weight go if it is in class 0.
FITCOMPRESS_INLINE void set_slots(const Thresholds& thresholds, const SlotTables& tables,
                                  int64_t count, Block* block) {
  const auto classes = static_cast<uint32_t>(tables.classes);
  const auto first_cell = static_cast<uint32_t>(tables.first_cell);
  const auto cells = static_cast<uint32_t>(tables.last_cell - tables.first_cell);
  const auto spare = static_cast<uint32_t>(tables.size());
  for (int64_t j = 0; j < count; ++j) {
    block->bin[j] = thresholds.bin(block->key[j]);
    const uint32_t cell = static_cast<uint32_t>(block->cell[j]) - first_cell;
    const uint32_t elsewhere = spare + (static_cast<uint32_t>(j) & (SlotTables::kSpare - 1));
    block->slot[j] = cell < cells ? cell * classes : elsewhere;
  }
}

template <int Lanes, class T>
FITCOMPRESS_INLINE void fill_chunk(const Layer<T>& layer, const GridGroup& group, int64_t begin,
                                   int64_t end, const SlotTables& tables, Slot* slots) {
  const Thresholds& thresholds = *layer.thresholds;
  // A copy: among equal keys, the search for a class goes on where the last one ended.
  uint16_t bin_class[Thresholds::kBins];
  std::copy(thresholds.bin_class.begin(), thresholds.bin_class.end(), bin_class);
  const bool some_cells = tables.last_cell - tables.first_cell < group.cells();
  const float first_x = some_cells ? group.first_x_of_cell(tables.first_cell) : 0.0f;
  const float last_x = some_cells ? group.first_x_of_cell(tables.last_cell) : 0.0f;
  Block block;
  int64_t filled = -1;
  if (group.steps) {
    std::fill(block.inverse_range, block.inverse_range + kBlock, 1.0);
    std::fill(block.squared_range, block.squared_range + kBlock, 1.0);
  }
  for (; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    if (!group.steps) set_scales(layer, begin, begin + count, &filled, &block);
    load(layer, group.steps, begin, count, &block);
    if (some_cells && !any_between(block.x, count, first_x, last_x)) continue;
    group.template index<Lanes>(block.x, round_up(count, 16), block.cell, block.code);
    set_terms(layer.fisher == nullptr ? nullptr : layer.fisher + begin, group.spacing[group.finest],
              count, &block);
    layer.importance.keys(begin, count, block.key);
    set_slots(thresholds, tables, count, &block);
    const auto add = [&](int64_t j, uint32_t of_class) __attribute__((always_inline)) {
      add_terms(block.terms + 4 * j, slots + block.slot[j] + of_class);
    };
    const auto add_exactly = [&](int64_t j) __attribute__((always_inline)) {
      uint16_t* const entry = bin_class + block.bin[j];
      const uint32_t of_class = thresholds.class_of(*entry, block.key[j], begin + j);
      if (*entry >= Thresholds::kMixed && thresholds.one_key(block.bin[j])) {
        *entry = static_cast<uint16_t>(Thresholds::kMixed + of_class);
      }
      add(j, of_class);
    };
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {  // four at a time: one branch on whether a bin is mixed
      const uint32_t a = bin_class[block.bin[j]], b = bin_class[block.bin[j + 1]];
      const uint32_t c = bin_class[block.bin[j + 2]], d = bin_class[block.bin[j + 3]];
      if (__builtin_expect((a | b | c | d) < Thresholds::kMixed, 1)) {
        add(j, a);
        add(j + 1, b);
        add(j + 2, c);
        add(j + 3, d);
      } else {
        for (int64_t i = j; i < j + 4; ++i) add_exactly(i);
      }
    }
    for (; j < count; ++j) add_exactly(j);
  }
}

}  // namespace

template <class T>
void fill_slots(const Layer<T>& layer, const GridGroup& group, SlotTables* tables) {
  fill_chunks(layer.shape->count(), tables,
              [&](int64_t begin, int64_t end, Slot* slots, auto lanes) __attribute__((
                  always_inline)) { fill_chunk<lanes>(layer, group, begin, end, *tables, slots); });
}

template void fill_slots<float>(const Layer<float>&, const GridGroup&, SlotTables*);
template void fill_slots<BFloat16>(const Layer<BFloat16>&, const GridGroup&, SlotTables*);
template void fill_slots<Float16>(const Layer<Float16>&, const GridGroup&, SlotTables*);

}  // namespace fitcompress
