// One budget: dynamic programming over the layers whose level is in doubt.
//
// The linear relaxation leaves one layer between two levels; with it rounded down, all layers have
// a level, the break plan. A plan is the sum of its changes to that. Layers are added to a list of
// partial plans one by one, those with the largest changes first, so that what is left to decide
// gets ever finer. A partial plan stays if no other one costs no more and is no worse, and if the
// linear relaxation of the layers to come does not put it above the best plan known. Rounding that
// relaxation gives the best plans known.
//
// A minimal algorithm in the sense of D. Pisinger, "A minimal algorithm for the multiple-choice
// knapsack problem", EJOR 83 (1995), with the full relaxation as bound and the largest layers first
// (his order is by closeness to the break multiplier; on layers of very different sizes ours needs
// a hundredth of the states).
#pragma once

#include "search/level_lists.h"
#include "search/watch.h"

namespace fitcompress {

// As `knapsack`, with exactly one budget; `choice` holds indices into the lists. `known`: a plan
// within the budget, or nothing.
KnapsackResult solve_single_budget(const ReducedKnapsack& problem, double gap,
                                   const LevelChoice& known, Watch* watch);

}  // namespace fitcompress
