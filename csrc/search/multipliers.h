// The Lagrangian bound, and the multipliers that make it largest.
//
// For multipliers μ ≥ 0, every plan within the budgets has a value of at least
//
//   g(μ) = Σ_l min_k (value[l, k] + Σ_m μ_m share[m, l, k]) − Σ_m μ_m,
//
// where shares are costs over limits. g is concave; its maximum is that of the linear relaxation.
// It is found by Dantzig and Wolfe's decomposition: the best mixture of the plans seen so far gives
// multipliers, these give the next plan. The master problem has one row per budget and one more.
#pragma once

#include <cstdint>
#include <vector>

#include "search/level_lists.h"

namespace fitcompress {

// No plan has such a value: they are scaled to 2 at most.
constexpr double kOutOfReach = 4.0;

// A plan, by its sums, and the multipliers that it is the best one for.
struct PricedPlan {
  double value;
  PerBudget share;
  PerBudget multipliers;
};

// Returns g(μ), less what rounding may have added. `choice` may be null; of equal levels the first.
double best_plan(const LevelLists& levels, const PerBudget& multipliers, PricedPlan* plan,
                 LevelChoice* choice);

struct MixedPlan {
  double weight;
  PerBudget multipliers;
};

struct Relaxed {
  double bound;                // the largest g found
  PerBudget multipliers;       // where
  std::vector<MixedPlan> mix;  // weights sum up to 1, unless the budgets seem out of reach
  bool reachable;              // whether they do
};

// Starts from the plans of some multipliers; ends when the bound reaches `target`, when it is
// within `tolerance` · |bound| of the maximum or a fiftieth of the way to the target from it, or
// after `most` plans. Out of reach, it may end at any bound.
Relaxed maximise_bound(const LevelLists& levels, const std::vector<PerBudget>& start, double target,
                       double tolerance, int most);

}  // namespace fitcompress
