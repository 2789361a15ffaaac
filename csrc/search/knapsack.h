// The multiple-choice knapsack: one level for every layer, at the least value within budgets.
//
//   minimise Σ_l value[l, k_l]  subject to  Σ_l cost[m, l, k_l] ≤ limit[m]  for every budget m.
//
// Costs are integers, so that a plan is within its budgets or not; values are float64. Everything
// below `knapsack` works on LevelLists: dominated levels dropped, layers in an order that does not
// depend on the caller's. Solved by branch_and_bound.h; with one budget, where that takes too many
// nodes, by single_budget.h.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fitcompress {

constexpr std::int32_t kMostBudgets = 3;

// Arrays [budgets, layers, levels] and [layers, levels], C-contiguous, owned by the caller.
struct KnapsackTables {
  std::int32_t budgets;
  std::int32_t layers;
  std::int32_t levels;
  const std::int64_t* cost;   // ≥ 0
  const double* value;        // finite, or +∞ for a level that may not be used
  const std::int64_t* limit;  // one a budget

  std::size_t at(std::int32_t layer, std::int32_t level) const {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(levels) +
           static_cast<std::size_t>(level);
  }
  std::int64_t cost_at(std::int32_t budget, std::int32_t layer, std::int32_t level) const {
    return cost[static_cast<std::size_t>(budget) * static_cast<std::size_t>(layers) *
                    static_cast<std::size_t>(levels) +
                at(layer, level)];
  }
  // Throws std::invalid_argument, with the numbers, on what no search can work with.
  void check() const;
};

// Called every few hundredths of a second with the best value so far (∞: none) and a lower bound of
// all values (−∞: none); false ends the search.
using KnapsackProgress = std::function<bool(double best, double bound)>;

struct KnapsackOptions {
  double gap;      // (value − bound) / |value| to stop at; 0: optimal, but for rounding
  double seconds;  // ∞: no limit
  KnapsackProgress progress;
};

enum class KnapsackStatus {
  kSolved,      // proven to the gap
  kStopped,     // by time, progress or memory; the best so far
  kInfeasible,  // no plan is within all budgets
};

struct KnapsackResult {
  KnapsackStatus status = KnapsackStatus::kInfeasible;
  std::vector<std::int32_t> choice;  // a level for every layer; empty: no plan is known
  double bound = 0.0;                // no plan has a lower value
  bool timed_out = false;            // stopped for the time
  std::int64_t nodes = 0;            // of the search tree, or states of the dynamic program
};

KnapsackResult knapsack(const KnapsackTables& tables, const KnapsackOptions& options);

}  // namespace fitcompress
