// One pass over the weights for a group of grids: sums per (cell, class).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/vector.h"
#include "distortion/distortion_table.h"
#include "distortion/grid_group.h"
#include "distortion/thresholds.h"

namespace fitcompress {

// The weights of a cell and class: with F' = F·range² and d = x − θ̂/range on the finest grid,
// Σ F', Σ F'd, Σ F'd², and their number: positive ones plus kNegative times negative ones.
struct Slot {
  double moment[3];
  double numbers;
};
constexpr double kNegative = 67108864.0;  // 2^26, more than a chunk has weights

// Tables of slots, one a chunk, with the cells [first_cell, last_cell) × classes, and some more
// that take up the weights of other cells.
struct SlotTables {
  static constexpr int64_t kSpare = 8;

  int64_t first_cell, last_cell, classes, chunks;
  Slot* slots;

  int64_t size() const { return (last_cell - first_cell) * classes; }
  int64_t pitch() const { return size() + classes + kSpare; }
  Slot* table(int64_t chunk) const { return slots + chunk * pitch(); }
  const Slot* row(int64_t chunk, int64_t cell) const {
    return table(chunk) + (cell - first_cell) * classes;
  }
};

// The layer as the passes see it.
template <class T>
struct Layer {
  const DistortionShape* shape;
  const T* weight;
  const float* fisher;  // may be null
  const float* range;
  Importance<T> importance;
  const Thresholds* thresholds;
};

typedef double Terms __attribute__((vector_size(sizeof(Slot)), may_alias));

FITCOMPRESS_INLINE void add_terms(const double* terms, Slot* slot) {
  *reinterpret_cast<Terms*>(slot) += *reinterpret_cast<const Terms*>(terms);
}

// Calls fill(begin, end, slots, lanes) for every chunk of the weights and its table, which is all
// zeros, in the form that dispatch_isa wants. Chunks are equal parts whose number does not depend
// on that of the threads.
template <class Fill>
void fill_chunks(int64_t count, SlotTables* tables, const Fill& fill) {
  constexpr int64_t kUnit = 1024;
  const int64_t size = round_up(ceil_div(count, tables->chunks), kUnit);
  parallel_for(tables->chunks, 1, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
      for (int64_t c = first; c < last; ++c) {
        Slot* const slots = tables->table(c);
        std::memset(slots, 0, static_cast<size_t>(tables->pitch()) * sizeof(Slot));
        fill(std::min(c * size, count), std::min((c + 1) * size, count), slots, lanes);
      }
    });
  });
}

// The slots of the cells that tables names, for a group of grids.
template <class T>
void fill_slots(const Layer<T>& layer, const GridGroup& group, SlotTables* tables);

}  // namespace fitcompress
