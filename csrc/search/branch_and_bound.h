// Several budgets: branch and bound on the linear relaxation.
//
// A node is a set of levels that may be used. Its bound is that of the best multipliers
// (multipliers.h), where levels whose reduced cost puts every plan with them above the target are
// dropped for good. The relaxation is a mixture of a few plans; repairing each gives plans within
// the budgets. Where these plans differ most, in a layer's share of a budget, the levels of that
// layer are cut in two at the mixture's mean. The node of the lowest bound is next; until a plan is
// known, the last one.
#pragma once

#include "search/level_lists.h"
#include "search/watch.h"

namespace fitcompress {

// As `knapsack`, with any number of budgets; stopped after `most_nodes`. `choice` holds indices
// into the lists.
KnapsackResult branch_and_bound(const ReducedKnapsack& problem, double gap, std::int64_t most_nodes,
                                Watch* watch);

}  // namespace fitcompress
