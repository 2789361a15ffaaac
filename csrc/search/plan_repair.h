// From a plan near the budgets to a good one within them.
#pragma once

#include <limits>

#include "search/level_lists.h"

namespace fitcompress {

// The best plan known; indices into the lists of the whole problem.
struct Incumbent {
  double value = std::numeric_limits<double>::infinity();
  double size = 0.0;  // sum of the magnitudes of its values
  LevelChoice choice;
};

// While a budget is overdrawn, makes the change that hurts least for what it brings, at these
// multipliers; then, while one fits, the change that helps most for what it costs. Replaces the
// incumbent by a better plan. `lists` were selected from the problem's, `choice` is an index there.
void repair_plan(const ReducedKnapsack& problem, const LevelLists& lists, LevelChoice choice,
                 const PerBudget& multipliers, Incumbent* incumbent);

}  // namespace fitcompress
