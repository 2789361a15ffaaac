#include "search/knapsack.h"

#include <limits>
#include <utility>

#include "search/branch_and_bound.h"
#include "search/level_lists.h"
#include "search/single_budget.h"
#include "search/watch.h"

namespace fitcompress {
namespace {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();
// With one budget branching proves most plans in tens of nodes, whatever the layers. Where costs
// and values nearly form a line it never ends, and dynamic programming takes over.
constexpr std::int64_t kMostNodes = 2000;

}  // namespace

KnapsackResult knapsack(const KnapsackTables& tables, const KnapsackOptions& options) {
  tables.check();
  Watch watch(options);
  const ReducedKnapsack problem = reduce(tables, &watch);
  if (!problem.feasible) return {};
  watch.set_scale(problem.scale);
  // So that the gap that is reported, with its own rounding, is no larger.
  const double gap = options.gap * (1.0 - 1e-9);
  KnapsackResult result;
  if (problem.levels.budgets == 0) {  // every layer has its best level, the only one left
    result.status = KnapsackStatus::kSolved;
    for (std::int32_t l = 0; l < problem.levels.layers(); ++l) {
      result.choice.push_back(l);
      result.bound += problem.levels.value[static_cast<std::size_t>(l)];
    }
  } else if (problem.levels.budgets == 1) {
    result = branch_and_bound(problem, gap, kMostNodes, &watch);
    if (result.status == KnapsackStatus::kStopped && !watch.stopped()) {
      result = solve_single_budget(problem, gap, result.choice, &watch);
    }
  } else {
    result = branch_and_bound(problem, gap, kNoLimit, &watch);
  }
  result.bound /= problem.scale;
  result.timed_out = watch.timed_out();
  std::vector<std::int32_t> choice(result.choice.size());
  for (std::size_t l = 0; l < choice.size(); ++l) {
    const auto level = static_cast<std::size_t>(result.choice[l]);
    choice[static_cast<std::size_t>(problem.layer[l])] = problem.levels.origin[level];
  }
  result.choice = std::move(choice);
  return result;
}

}  // namespace fitcompress
