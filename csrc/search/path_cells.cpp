#include "search/path_cells.h"

#include <cmath>
#include <limits>

namespace fitcompress {

PathCells::PathCells(const PathTables& tables)
    : layers_(tables.layers), grids_(tables.grids), sparsities_(tables.sparsities) {
  cells_.reserve(tables.count());
  for (Sparsity s(0); s.value() < sparsities_; s = s.next()) {
    for (Layer l(0); l.value() < layers_; l = l.next()) {
      for (Grid g(0); g.value() < grids_; g = g.next()) {
        const std::size_t i = tables.at(l, g, s);
        Cell cell{};
        cell.norm = tables.norm[i];
        cell.step = std::numeric_limits<double>::infinity();
        if (g != tables.last_grid()) {
          const std::size_t next = tables.at(l, g.next(), s);
          cell.step = std::sqrt(tables.grid_length[i]);
          cell.norm_change = tables.norm[next] - tables.norm[i];
          cell.cost_change = tables.cost[next] - tables.cost[i];
        }
        if (s != tables.last_sparsity()) {
          const std::size_t next = tables.at(l, g, s.next());
          cell.prune = tables.prune_length[i];
          cell.pruned_norm = tables.norm[next];
          cell.pruned_cost = tables.cost[next];
        }
        cells_.push_back(cell);
      }
    }
  }
}

}  // namespace fitcompress
