// FITCompress: the shortest path through compression space under a static metric.
//
// A step makes one layer's grid coarser, of length sqrt(grid_length), or raises the sparsity of
// the network, of length sqrt(Σ prune_length). Nodes are expanded in the order of f = g + λ h:
// g is the length of the way so far, h = |cost − budget| / reference · sqrt(Σ norm) that of a
// straight shrink for the rest. h is not admissible in general; with λ = 0 and best_first the
// path is a shortest one. Zandonati et al. 2023, arXiv 2302.07612.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "search/path_tables.h"
#include "search/types.h"

namespace fitcompress {

enum class PathMode {
  kGreedy,     // after an expansion only its children stay open
  kBeam,       // the best beam_width open nodes stay open
  kBestFirst,  // all stay open
};

enum class PathStatus {
  kReached,    // the levels are within the budget
  kExhausted,  // nothing is left to expand; the cheapest levels that were reached
  kLimit,      // max_expansions or memory for 2^23 open nodes were not enough; likewise
};

struct PathOptions {
  double start_length;
  Cost budget;
  std::int64_t reference_cost;
  double lam;
  PathMode mode;
  std::int64_t beam_width;
  std::int64_t max_expansions;
};

// Either a layer's grid becomes `index`, or (layer −1) the sparsity.
struct Move {
  Layer layer;
  std::int32_t index;
  bool prunes() const { return layer.value() < 0; }
};

struct PathResult {
  Levels levels;
  double length;
  double distortion;
  Cost cost;
  std::int64_t expansions;
  PathStatus status;
  std::vector<Move> moves;  // from the finest levels to these; their lengths sum up to `length`
};

// Thrown when `interrupted`, called every few milliseconds, says so.
struct PathInterrupted {};

// Throws std::invalid_argument on impossible tables or options.
PathResult path_search(const PathTables& tables, const PathOptions& options,
                       const std::function<bool()>& interrupted);

}  // namespace fitcompress
