// The tables of a path search, arranged for expansions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "search/path_nodes.h"
#include "search/path_tables.h"
#include "search/types.h"

namespace fitcompress {

// All that an expansion needs of a layer's level: one cache line.
struct alignas(64) Cell {
  double norm;         // Σ F θ̂²
  double norm_change;  // of the step to the next grid
  double step;         // length of that step; infinite where there is none
  double prune;        // squared length of the step to the next sparsity
  double pruned_norm;  // after that step
  std::int64_t cost_change;
  std::int64_t pruned_cost;
};

class PathCells {
 public:
  explicit PathCells(const PathTables& tables);

  std::int32_t layers() const { return layers_; }
  // The step that raises the sparsity.
  Step pruning() const { return layers_; }
  bool can_prune(const Node& node) const { return node.levels()[layers_] + 1 < sparsities_; }

  const Cell& at(const Node& node, std::int32_t layer) const {
    const std::size_t row =
        static_cast<std::size_t>(node.levels()[layers_]) * static_cast<std::size_t>(layers_) +
        static_cast<std::size_t>(layer);
    return cells_[row * static_cast<std::size_t>(grids_) + node.levels()[layer]];
  }

  // After a step that exists.
  Cost cost_after(const Node& node, Step step) const {
    if (step != pruning()) return node.cost + Cost(at(node, step).cost_change);
    Cost total;
    for (std::int32_t l = 0; l < layers_; ++l) total = total + Cost(at(node, l).pruned_cost);
    return total;
  }

 private:
  std::int32_t layers_, grids_, sparsities_;
  std::vector<Cell> cells_;  // [sparsities, layers, grids]
};

}  // namespace fitcompress
