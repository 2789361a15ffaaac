// Which open nodes there are, and which of them comes next.
//
// Open nodes are not built: one is the step of its parent, until it is taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>

#include "search/path_cells.h"
#include "search/path_metric.h"
#include "search/path_nodes.h"
#include "search/types.h"

namespace fitcompress {

struct Open {
  double f;
  Cost cost;
  std::int32_t parent;
  Step step;

  // A strict order: f, cost, and then the order in which expansions come to them.
  friend bool operator<(const Open& a, const Open& b) {
    if (a.f != b.f) return a.f < b.f;
    return std::tie(a.cost, a.parent, a.step) < std::tie(b.cost, b.parent, b.step);
  }
};

class Frontier {
 public:
  virtual ~Frontier() = default;
  // Opens the children of a node that was just expanded.
  virtual void add(std::int32_t id, const Children& children) = 0;
  // Takes out the best open node, never the same levels twice. False: nothing is open.
  virtual bool take(Open* best) = 0;
  virtual std::size_t bytes() const = 0;
};

// After an expansion only its children stay open.
std::unique_ptr<Frontier> greedy_frontier();
// The best `width` open nodes stay open, one for the same levels; others are forgotten.
std::unique_ptr<Frontier> beam_frontier(const NodeStore& nodes, std::int64_t width);
// All stay open. `commutes`: steps of two layers add up to the same length in either order.
std::unique_ptr<Frontier> full_frontier(const NodeStore& nodes, const PathCells& cells,
                                        bool commutes);

}  // namespace fitcompress
