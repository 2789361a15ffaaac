// FITCompress: a short path through compression space.
//
// A step makes one layer's grid coarser, or raises the sparsity of the network. Nodes are expanded
// in the order of f = g + λ h: g is the length of the way so far, a sum of sqrt(Σ F (θ − θ')²) over
// its steps, h = |cost − budget| / reference · sqrt(Σ F θ²) that of a straight shrink for the rest.
// h is not admissible in general; with λ = 0, best_first and F the same everywhere, the path is a
// shortest one. Zandonati et al. 2023, arXiv 2302.07612.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "search/path_metric.h"
#include "search/path_moves.h"
#include "search/path_tables.h"
#include "search/types.h"

namespace fitcompress {

enum class PathMode {
  kGreedy,     // after an expansion only its children stay open
  kBeam,       // the best beam_width open nodes stay open
  kBestFirst,  // all stay open
};

enum class PathStatus {
  kReached,      // the levels are within the budget
  kExhausted,    // nothing is left to expand: the cheapest levels that were reached
  kLimit,        // max_expansions or a gigabyte was not enough: the best levels so far, which are
                 // the best ones within the budget, if there are any, or else the cheapest
  kInterrupted,  // `watch` or `measure` said so; likewise
};

// Thrown by a `Measure` to end the search as kInterrupted.
struct PathInterrupted {};

struct PathOptions {
  double start_length;
  Cost budget;
  std::int64_t reference_cost;
  double lam;
  PathMode mode;
  std::int64_t beam_width;
  std::int64_t max_expansions;
  bool trace;
};

struct PathProgress {
  std::int64_t expansions;
  Cost cost;  // the lowest of an expanded node
};

enum class PathOrder { kGoOn, kInterrupt, kGiveUp };  // kGiveUp ends as kLimit

// Is called at every node of a moving metric, and otherwise several hundred times a second.
using PathWatch = std::function<PathOrder(const PathProgress&)>;

// An expanded node, or the last one.
struct PathVisit {
  Levels levels;
  double g, f;
  Cost cost;
};

struct PathResult {
  Levels levels;
  double length;  // of the moves; under a moving metric, g of the node before steps were undone
  double distortion;
  Cost cost;
  std::int64_t expansions;
  PathStatus status;
  std::vector<Move> moves;  // from the finest levels to these
  std::vector<PathVisit> trace;
};

// `measure`, if not empty, is the moving metric, and `exact` whether it is asked at children, too.
// Throws std::invalid_argument on impossible tables or options.
PathResult path_search(const PathTables& tables, const PathOptions& options, const Measure& measure,
                       bool exact, const PathWatch& watch);

}  // namespace fitcompress
