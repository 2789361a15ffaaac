// Lower convex hulls of the layers, and the plans that they span.
//
// With one budget and a multiplier μ ≥ 0 every layer minimises value + μ·cost on its own, at a
// corner of its lower convex hull. Lowering μ from ∞ to 0 takes one hull edge after the other, by
// falling rate: from the cheapest plan to the best one, along the convex front. Between two
// neighbours on the front lies the optimum of the linear relaxation.
#pragma once

#include <cstdint>
#include <vector>

#include "search/level_lists.h"

namespace fitcompress {

// From one corner of a layer's hull to the next, dearer one.
struct HullEdge {
  double rate;  // what the value falls by per cost, > 0
  std::int32_t layer;
  std::int32_t from;  // levels
  std::int32_t to;
  std::int64_t cost;  // > 0
  double value;       // < 0
};

// All edges, by falling rate; those of a layer in the order of its hull. Every layer starts at its
// first level.
std::vector<HullEdge> convex_front(const LevelLists& levels);

// The same in the caller's layers and levels, with the level that every layer starts at.
std::vector<HullEdge> convex_front(const KnapsackTables& tables, std::vector<std::int32_t>* start);

}  // namespace fitcompress
