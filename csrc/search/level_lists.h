// The levels of every layer that a plan may need.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "search/knapsack.h"
#include "search/watch.h"

namespace fitcompress {

// One number per budget: multipliers μ, or shares of the limits.
using PerBudget = std::array<double, kMostBudgets>;

// Levels one after the other, those of a layer together, by falling value: with one budget thus by
// rising cost.
struct LevelLists {
  std::int32_t budgets = 0;
  std::vector<std::int32_t> begin{0};  // of every layer; the last one is the end
  std::vector<double> value;
  std::array<std::vector<std::int64_t>, kMostBudgets> cost;
  std::array<std::vector<double>, kMostBudgets> share;  // cost / limit
  std::vector<std::int32_t> origin;                     // where the level was copied from

  std::int32_t layers() const { return static_cast<std::int32_t>(begin.size()) - 1; }
  std::int32_t size() const { return static_cast<std::int32_t>(value.size()); }
  void clear();
  void add(const LevelLists& from, std::int32_t level);  // origin: `level`
  void pop();                                            // the last one added
  void end_layer() { begin.push_back(size()); }

  // value + Σ_m μ_m share_m of a level.
  double priced(std::int32_t level, const PerBudget& multipliers) const {
    double sum = value[static_cast<std::size_t>(level)];
    for (std::int32_t m = 0; m < budgets; ++m) {
      const auto budget = static_cast<std::size_t>(m);
      sum += multipliers[budget] * share[budget][static_cast<std::size_t>(level)];
    }
    return sum;
  }
};

// One level of every layer, as an index into LevelLists.
using LevelChoice = std::vector<std::int32_t>;

// A problem of which nothing can be dropped at sight.
struct ReducedKnapsack {
  bool feasible;  // each budget on its own
  LevelLists levels;
  std::array<std::int64_t, kMostBudgets> limit;
  std::vector<std::int32_t> layer;  // the caller's layer of every list; origin: its level
  double scale;                     // a power of two; values times this sum up to 2 at most
  double fixed_value = 0.0;         // of layers that have been decided and are no longer listed

  bool within(const std::array<std::int64_t, kMostBudgets>& total) const {
    for (std::int32_t m = 0; m < levels.budgets; ++m) {
      if (total[static_cast<std::size_t>(m)] > limit[static_cast<std::size_t>(m)]) return false;
    }
    return true;
  }
};

// Drops levels that fit into no plan, budgets that every plan keeps, and levels that another one of
// the layer beats in all respects; of equal ones the first stays. Layers are sorted by their
// levels.
ReducedKnapsack reduce(const KnapsackTables& tables, Watch* watch);

// Of one budget, whatever its limit: drops only levels that another one beats.
ReducedKnapsack undominated_levels(const KnapsackTables& tables);

}  // namespace fitcompress
