// Lengths of the steps from a node, and how far their ends are from the budget.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "search/path_cells.h"
#include "search/path_nodes.h"
#include "search/types.h"

namespace fitcompress {

// What the L + 1 steps from a node lead to; f is infinite where there is no step.
struct Children {
  explicit Children(std::int32_t layers)
      : f(static_cast<std::size_t>(layers) + 1), norm(f.size()), away(f.size()), cost(f.size()) {}

  std::vector<double> f;
  std::vector<double> norm;  // Σ F θ̂²
  std::vector<double> away;  // |cost − budget|
  std::vector<Cost> cost;
};

// Under F at one node. Squared lengths, norms Σ F θ̂² here and after a layer's step; the step to
// the next sparsity is one for all layers. Where there is no step, its numbers are not read.
struct Steps {
  std::vector<double> grid_length, norm, norm_after;
  double prune_length = 0.0, norm_pruned = 0.0;
};

// Re-estimates F at given levels. May throw.
using Measure = std::function<Steps(const std::vector<std::int32_t>& grids, std::int32_t sparsity)>;

// h of an end of a step: scale · |cost − budget| · sqrt(norm).
struct Heuristic {
  Cost budget;
  double scale;  // λ / reference cost
};

// F is either the same everywhere, and the numbers are those of the cells; or measured anew at
// every node (`refresh`); or at every child, too, for its norm (`exact`).
class PathMetric {
 public:
  PathMetric(const PathCells& cells, Heuristic heuristic, Measure measure, bool exact)
      : cells_(cells), heuristic_(heuristic), measure_(std::move(measure)), exact_(exact) {}

  bool moves() const { return static_cast<bool>(measure_); }

  // λ h of a node that no step led to.
  double h_of_start(const Node& start) const;

  // Fills in what the steps of a node lead to. Moving metrics do so in the order of the nodes.
  void expand(std::int32_t id, const Node& node, Children* children);

  // Length of a step of an expanded node.
  double length(std::int32_t id, const Node& node, Step step) const;

 private:
  void measure(std::int32_t id, const Node& node, Children* children);

  const PathCells& cells_;
  Heuristic heuristic_;
  Measure measure_;
  bool exact_;
  std::vector<double> lengths_;  // of a moving metric, [nodes, layers + 1]
};

}  // namespace fitcompress
