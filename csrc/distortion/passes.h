// As many passes over the weights as a group of grids needs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "distortion/cells.h"
#include "distortion/grid_group.h"
#include "distortion/slots.h"
#include "distortion/workspace.h"

namespace fitcompress {

// The largest power of two up to a number ≥ 1: so many equal tasks suit most numbers of threads.
inline int64_t power_of_two(int64_t number) {
  int64_t power = 1;
  while (2 * power <= number) power *= 2;
  return power;
}

// Sizes of tables, from the layer's alone: results must not depend on the number of threads.
struct PassPlan {
  int64_t count;   // weights
  int64_t budget;  // bytes for tables
  int64_t classes;
  Workspace* workspace;

  // From some size on, two threads are to have work.
  int64_t min_chunks() const { return std::max(count < 65536 ? int64_t{1} : 2, count >> 25); }
  int64_t row_bytes() const { return classes * static_cast<int64_t>(sizeof(Slot)); }
  // How many cells a table may have.
  int64_t max_cells() const { return std::max<int64_t>(1, budget / min_chunks() / row_bytes()); }
  // How many tables of so many cells to use.
  int64_t chunks(int64_t cells) const {
    const int64_t affordable = budget / (cells * row_bytes());
    const int64_t useful = std::max(min_chunks(), std::min<int64_t>(count >> 18, 16));
    return std::max(min_chunks(), power_of_two(std::min(affordable, useful)));
  }
};

// The next group of the family that ends at `end`: as many grids as have room for the cells of
// weights up to `typical`, and the one after them, to which the last one needs the distance. The
// few larger weights get passes of their own.
GridGroup next_group(const DistortionShape& shape, size_t first, size_t end, int64_t max_cells,
                     float max_weight, float typical);

// Calls fill(&tables), which makes the sums of the cells that tables names, for all cells of a
// group, in ranges that fit into the budget; and adds them to the sums.
template <class Fill>
void sum_group(const PassPlan& plan, const GridGroup& group, bool sum_pruned, ClassSums* sums,
               const Fill& fill) {
  const int64_t cells = std::min(group.cells(), plan.max_cells());
  SlotTables tables{0, cells, plan.classes, plan.chunks(cells), nullptr};
  tables.slots = plan.workspace->take<Slot>(tables.chunks * tables.pitch());
  CellWalk walk(group, sums, sum_pruned);
  for (int64_t cell = 0; cell < group.cells(); cell += cells) {
    tables.first_cell = cell;
    tables.last_cell = std::min(cell + cells, group.cells());
    fill(&tables);
    walk.add(tables);
  }
  walk.finish();
}

}  // namespace fitcompress
