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

// The level of least value + Σ_m μ_m share_m of every layer, in `choice`.
template <std::size_t Budgets>
void least_priced(const LevelLists& levels, const PerBudget& multipliers, std::int32_t* choice) {
  const double* const value = levels.value.data();
  const double* share[Budgets];
  for (std::size_t m = 0; m < Budgets; ++m) share[m] = levels.share[m].data();
  const auto layers = static_cast<std::size_t>(levels.layers());
  for (std::size_t l = 0; l < layers; ++l) {
    double least = std::numeric_limits<double>::infinity();
    std::int32_t best = levels.begin[l];
    for (std::int32_t k = levels.begin[l]; k < levels.begin[l + 1]; ++k) {
      double priced = value[k];
      for (std::size_t m = 0; m < Budgets; ++m) priced += multipliers[m] * share[m][k];
      if (priced < least) {
        least = priced;
        best = k;
      }
    }
    choice[l] = best;
  }
}

}  // namespace

double best_plan(const LevelLists& levels, const PerBudget& multipliers, PricedPlan* plan,
                 LevelChoice* choice) {
  const auto budgets = static_cast<std::size_t>(levels.budgets);
  LevelChoice own;
  if (choice == nullptr) {
    own.resize(static_cast<std::size_t>(levels.layers()));
    choice = &own;
  }
  static_assert(kMostBudgets == 3);
  const auto least = budgets == 1   ? least_priced<1>
                     : budgets == 2 ? least_priced<2>
                                    : least_priced<3>;
  least(levels, multipliers, choice->data());
  double value = 0.0, size = 0.0;
  PerBudget share{};
  for (const std::int32_t level : *choice) {
    const auto at = static_cast<std::size_t>(level);
    value += levels.value[at];
    size += std::abs(levels.value[at]);
    for (std::size_t m = 0; m < budgets; ++m) share[m] += levels.share[m][at];
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
