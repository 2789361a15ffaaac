#include "search/multipliers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "search/mixture.h"

namespace fitcompress {
namespace {

// Of the plan that costs nothing, at first and where budgets still seem out of reach: then all
// others must become so dear that the bound shows it.
constexpr double kForbidding[] = {1e4, 1e9};

}  // namespace

double best_plan(const LevelLists& levels, const PerBudget& multipliers, PricedPlan* plan,
                 LevelChoice* choice) {
  const auto budgets = static_cast<std::size_t>(levels.budgets);
  double value = 0.0, size = 0.0;
  PerBudget share{};
  for (std::int32_t l = 0; l < levels.layers(); ++l) {
    const auto layer = static_cast<std::size_t>(l);
    double least = std::numeric_limits<double>::infinity();
    std::int32_t best = levels.begin[layer];
    for (std::int32_t k = levels.begin[layer]; k < levels.begin[layer + 1]; ++k) {
      const double priced = levels.priced(k, multipliers);
      if (priced < least) {
        least = priced;
        best = k;
      }
    }
    const auto at = static_cast<std::size_t>(best);
    value += levels.value[at];
    size += std::abs(levels.value[at]);
    for (std::size_t m = 0; m < budgets; ++m) share[m] += levels.share[m][at];
    if (choice != nullptr) (*choice)[layer] = best;
  }
  *plan = {value, share, multipliers};
  double bound = value;
  for (std::size_t m = 0; m < budgets; ++m) {
    bound += multipliers[m] * (share[m] - 1.0);
    size += multipliers[m] * (share[m] + 1.0);
  }
  return bound - 1e-14 * size;
}

Relaxed maximise_bound(const LevelLists& levels, const std::vector<PerBudget>& start, double target,
                       double tolerance, int most) {
  Mixture mixture(levels.budgets, kForbidding[0]);
  Relaxed found{-std::numeric_limits<double>::infinity(), {}, {}, true};
  const auto try_multipliers = [&](const PerBudget& multipliers) {
    PricedPlan plan;
    const double bound = best_plan(levels, multipliers, &plan, nullptr);
    if (bound > found.bound) {
      found.bound = bound;
      found.multipliers = multipliers;
    }
    mixture.add(plan);
  };
  for (const PerBudget& multipliers : start) {
    try_multipliers(multipliers);
    if (found.bound >= target) return found;
  }
  for (const double forbidding : kForbidding) {
    mixture.forbid(forbidding);
    for (int plans = 0; plans < most; ++plans) {
      const double ceiling = mixture.solve();
      const double open = ceiling - found.bound;
      if (!(open > tolerance * std::abs(found.bound))) break;
      if (target < kOutOfReach && open < 0.02 * (target - found.bound)) break;
      try_multipliers(mixture.multipliers());
      if (found.bound >= target) return found;
    }
    found.mix = mixture.mix(&found.reachable);
    if (found.reachable) break;
  }
  return found;
}

}  // namespace fitcompress
