#include "search/level_lists.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fitcompress {
namespace {

using Totals = std::array<std::int64_t, kMostBudgets>;

// Which levels of a table may be used, and which budgets can bind.
struct Usable {
  std::vector<char> level;            // [layers, levels]
  std::vector<std::int32_t> budgets;  // those that can bind
  bool feasible;                      // each budget on its own
};

// The least and the largest cost of the usable levels of every layer, and their sums.
struct CostRange {
  std::vector<Totals> least;
  Totals least_sum{}, largest_sum{};
  bool empty = false;  // some layer has no usable level

  CostRange(const KnapsackTables& tables, const std::vector<char>& usable) {
    for (std::int32_t l = 0; l < tables.layers; ++l) {
      Totals low, high{};
      low.fill(std::numeric_limits<std::int64_t>::max());
      bool any = false;
      for (std::int32_t k = 0; k < tables.levels; ++k) {
        if (usable[tables.at(l, k)] == 0) continue;
        any = true;
        for (std::int32_t m = 0; m < tables.budgets; ++m) {
          const auto budget = static_cast<std::size_t>(m);
          low[budget] = std::min(low[budget], tables.cost_at(m, l, k));
          high[budget] = std::max(high[budget], tables.cost_at(m, l, k));
        }
      }
      empty = empty || !any;
      if (empty) return;
      for (std::size_t m = 0; m < static_cast<std::size_t>(tables.budgets); ++m) {
        least_sum[m] += low[m];
        largest_sum[m] += high[m];
      }
      least.push_back(low);
    }
  }
};

constexpr int kMostPasses = 8;  // over all levels; what a further one drops is little

// Drops levels that do not fit even beside the cheapest ones of all other layers.
Usable usable(const KnapsackTables& tables) {
  Usable found{{}, {}, false};
  const std::size_t cells = tables.at(tables.layers - 1, tables.levels - 1) + 1;
  for (std::size_t i = 0; i < cells; ++i) {
    found.level.push_back(std::isfinite(tables.value[i]) ? 1 : 0);
  }
  bool changed = true;
  for (int pass = 0; changed && pass < kMostPasses; ++pass) {
    changed = false;
    const CostRange range(tables, found.level);
    if (range.empty) return found;
    found.budgets.clear();
    for (std::int32_t m = 0; m < tables.budgets; ++m) {
      const auto budget = static_cast<std::size_t>(m);
      if (range.least_sum[budget] > tables.limit[m]) return found;
      if (range.largest_sum[budget] <= tables.limit[m]) continue;
      found.budgets.push_back(m);
      for (std::int32_t l = 0; l < tables.layers; ++l) {
        const std::int64_t others =
            range.least_sum[budget] - range.least[static_cast<std::size_t>(l)][budget];
        for (std::int32_t k = 0; k < tables.levels; ++k) {
          char& may_be_used = found.level[tables.at(l, k)];
          if (may_be_used == 0 || tables.cost_at(m, l, k) <= tables.limit[m] - others) continue;
          may_be_used = 0;
          changed = true;
        }
      }
    }
  }
  found.feasible = !changed || !CostRange(tables, found.level).empty;
  return found;
}

// A level while the levels of its layer are compared.
struct Candidate {
  double value;
  Totals cost;  // of the budgets that can bind, 0 behind them
  std::int32_t level;

  bool comes_before(const Candidate& other) const {
    if (value != other.value) return value < other.value;
    if (cost != other.cost) return cost < other.cost;
    return level < other.level;
  }
  bool costs_no_more_than(const Candidate& other) const {
    for (std::size_t m = 0; m < cost.size(); ++m) {
      if (cost[m] > other.cost[m]) return false;
    }
    return true;
  }
};

// Levels that no other beats, by falling value; with several budgets all pairs are looked at, as
// long as there is time.
std::vector<Candidate> undominated(const KnapsackTables& tables, const Usable& found,
                                   std::int32_t layer, Watch* watch) {
  constexpr double kUnknown = std::numeric_limits<double>::infinity();
  std::vector<Candidate> all, kept;
  for (std::int32_t k = 0; k < tables.levels; ++k) {
    if (found.level[tables.at(layer, k)] == 0) continue;
    Candidate candidate{tables.value[tables.at(layer, k)], {}, k};
    for (std::size_t m = 0; m < found.budgets.size(); ++m) {
      candidate.cost[m] = tables.cost_at(found.budgets[m], layer, k);
    }
    all.push_back(candidate);
  }
  std::sort(all.begin(), all.end(),
            [](const Candidate& a, const Candidate& b) { return a.comes_before(b); });
  const bool chain = found.budgets.size() <= 1;  // then the last one kept is the cheapest
  for (const Candidate& candidate : all) {
    const bool look = !chain && kept.size() % 64 == 63;
    const bool late = look ? watch->says_stop(kUnknown, -kUnknown) : !chain && watch->stopped();
    const auto first = (late || chain) && !kept.empty() ? kept.end() - 1 : kept.begin();
    const bool beaten = std::any_of(first, kept.end(), [&](const Candidate& better) {
      return better.costs_no_more_than(candidate);
    });
    if (!beaten) kept.push_back(candidate);
  }
  std::reverse(kept.begin(), kept.end());
  return kept;
}

bool lists_in_order(const std::vector<Candidate>& a, const std::vector<Candidate>& b) {
  return std::lexicographical_compare(
      a.begin(), a.end(), b.begin(), b.end(), [](const Candidate& x, const Candidate& y) {
        return x.value != y.value ? x.value < y.value : x.cost < y.cost;
      });
}

ReducedKnapsack assemble(const KnapsackTables& tables, const Usable& found, Watch* watch) {
  ReducedKnapsack problem{true, {}, {}, {}, 1.0};
  std::vector<std::vector<Candidate>> lists;
  for (std::int32_t l = 0; l < tables.layers; ++l) {
    lists.push_back(undominated(tables, found, l, watch));
  }
  problem.layer.resize(lists.size());
  std::iota(problem.layer.begin(), problem.layer.end(), 0);
  std::stable_sort(problem.layer.begin(), problem.layer.end(), [&](std::int32_t a, std::int32_t b) {
    return lists_in_order(lists[static_cast<std::size_t>(a)], lists[static_cast<std::size_t>(b)]);
  });
  LevelLists& levels = problem.levels;
  levels.budgets = static_cast<std::int32_t>(found.budgets.size());
  for (std::size_t m = 0; m < found.budgets.size(); ++m) {
    problem.limit[m] = tables.limit[found.budgets[m]];
  }
  for (const std::int32_t layer : problem.layer) {
    for (const Candidate& level : lists[static_cast<std::size_t>(layer)]) {
      levels.value.push_back(level.value);
      levels.origin.push_back(level.level);
      for (std::size_t m = 0; m < found.budgets.size(); ++m) {
        levels.cost[m].push_back(level.cost[m]);
        // A limit of 0 cannot bind once what does not fit is gone.
        levels.share[m].push_back(static_cast<double>(level.cost[m]) /
                                  static_cast<double>(problem.limit[m]));
      }
    }
    levels.end_layer();
  }
  double sum = 0.0;
  for (std::int32_t l = 0; l < levels.layers(); ++l) {
    double largest = 0.0;
    for (auto k = levels.begin[static_cast<std::size_t>(l)];
         k < levels.begin[static_cast<std::size_t>(l) + 1]; ++k) {
      largest = std::max(largest, std::abs(levels.value[static_cast<std::size_t>(k)]));
    }
    sum += largest;
  }
  // Of denormal numbers the inverse would be infinite.
  if (sum > 0.0) problem.scale = std::ldexp(1.0, std::min(1000, -std::ilogb(sum)));
  for (double& value : levels.value) value *= problem.scale;
  return problem;
}

}  // namespace

void LevelLists::clear() {
  begin.assign(1, 0);
  value.clear();
  origin.clear();
  for (auto& one : cost) one.clear();
  for (auto& one : share) one.clear();
}

void LevelLists::add(const LevelLists& from, std::int32_t level) {
  const auto at = static_cast<std::size_t>(level);
  value.push_back(from.value[at]);
  origin.push_back(level);
  for (std::size_t m = 0; m < static_cast<std::size_t>(budgets); ++m) {
    cost[m].push_back(from.cost[m][at]);
    share[m].push_back(from.share[m][at]);
  }
}

void LevelLists::pop() {
  value.pop_back();
  origin.pop_back();
  for (std::size_t m = 0; m < static_cast<std::size_t>(budgets); ++m) {
    cost[m].pop_back();
    share[m].pop_back();
  }
}

ReducedKnapsack reduce(const KnapsackTables& tables, Watch* watch) {
  const Usable found = usable(tables);
  if (!found.feasible) return {false, {}, {}, {}, 1.0};
  return assemble(tables, found, watch);
}

ReducedKnapsack undominated_levels(const KnapsackTables& tables) {
  Usable found = usable(tables);
  found.budgets = {0};
  return assemble(tables, found, nullptr);  // one budget takes no time
}

void KnapsackTables::check() const {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  if (budgets < 1 || budgets > kMostBudgets) {
    refuse("cost: got " + std::to_string(budgets) + " budgets, wanted 1 to " +
           std::to_string(kMostBudgets));
  }
  if (layers < 1 || levels < 1) {
    refuse("cost: got " + std::to_string(layers) + " layers of " + std::to_string(levels) +
           " levels, wanted at least one of each");
  }
  const std::int64_t most = (std::int64_t{1} << 61) / layers;  // sums must not overflow
  const auto place = [](std::int32_t l, std::int32_t k) {
    return "[" + std::to_string(l) + ", " + std::to_string(k) + "]";
  };
  for (std::int32_t l = 0; l < layers; ++l) {
    bool any = false;
    for (std::int32_t k = 0; k < levels; ++k) {
      const double v = value[at(l, k)];
      if (!(std::abs(v) <= 1e200) && v != std::numeric_limits<double>::infinity()) {
        refuse("value" + place(l, k) + ": got " + std::to_string(v) +
               ", wanted a number within ±1e200, or +inf");
      }
      any = any || std::isfinite(v);
      for (std::int32_t m = 0; m < budgets; ++m) {
        const std::int64_t c = cost_at(m, l, k);
        if (c >= 0 && c <= most) continue;
        refuse("cost[" + std::to_string(m) + "]" + place(l, k) + ": got " + std::to_string(c) +
               ", wanted 0 to " + std::to_string(most));
      }
    }
    if (!any) refuse("value: layer " + std::to_string(l) + " has no level that may be used");
  }
  for (std::int32_t m = 0; m < budgets; ++m) {
    if (limit[m] < 0) {
      refuse("limit[" + std::to_string(m) + "]: got " + std::to_string(limit[m]) +
             ", wanted at least 0");
    }
  }
}

}  // namespace fitcompress
