#include "search/plan_repair.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace fitcompress {
namespace {

using Totals = std::array<std::int64_t, kMostBudgets>;

class Repair {
 public:
  Repair(const ReducedKnapsack& problem, const LevelLists& lists, LevelChoice choice,
         const PerBudget& multipliers)
      : problem_(problem), lists_(lists), multipliers_(multipliers), choice_(std::move(choice)) {
    for (const std::int32_t level : choice_) {
      for (std::size_t m = 0; m < budgets(); ++m) total_[m] += lists_.cost[m][at(level)];
    }
  }

  // Returns whether the plan is within the budgets now.
  bool shrink() {
    double overdraft = over(total_);
    while (overdraft > 0.0) {
      Change best;
      double least = std::numeric_limits<double>::infinity(), after = overdraft;
      for_each_change([&](const Change& change) {
        const double left = over(total_after(change));
        if (left >= overdraft) return;
        const double rate = std::max(priced(change), 0.0) / (overdraft - left);
        if (rate >= least) return;
        least = rate;
        best = change;
        after = left;
      });
      if (best.layer < 0) return false;
      apply(best);
      overdraft = after;
    }
    return true;
  }

  void grow() {
    for (;;) {
      Change best;
      double most = 0.0;
      for_each_change([&](const Change& change) {
        const double gain = value(choice_[at(change.layer)]) - value(change.level);
        if (!(gain > 0.0) || !problem_.within(total_after(change))) return;
        const double rate = gain / (1e-9 + charge(change));
        if (rate <= most) return;
        most = rate;
        best = change;
      });
      if (best.layer < 0) return;
      apply(best);
    }
  }

  void offer(Incumbent* incumbent) const {
    double sum = 0.0;
    for (const std::int32_t level : choice_) sum += value(level);
    if (sum >= incumbent->value) return;
    incumbent->value = sum;
    incumbent->choice.clear();
    for (const std::int32_t level : choice_) incumbent->choice.push_back(lists_.origin[at(level)]);
  }

 private:
  struct Change {
    std::int32_t layer = -1;
    std::int32_t level = 0;
  };

  static std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }
  std::size_t budgets() const { return static_cast<std::size_t>(lists_.budgets); }
  double value(std::int32_t level) const { return lists_.value[at(level)]; }

  template <class Body>
  void for_each_change(const Body& body) const {
    for (std::int32_t l = 0; l < lists_.layers(); ++l) {
      for (std::int32_t k = lists_.begin[at(l)]; k < lists_.begin[at(l) + 1]; ++k) {
        if (k != choice_[at(l)]) body(Change{l, k});
      }
    }
  }

  Totals total_after(const Change& change) const {
    Totals total = total_;
    const std::size_t from = at(choice_[at(change.layer)]), to = at(change.level);
    for (std::size_t m = 0; m < budgets(); ++m) {
      total[m] += lists_.cost[m][to] - lists_.cost[m][from];
    }
    return total;
  }

  // Sum of the shares by which budgets are overdrawn.
  double over(const Totals& total) const {
    double sum = 0.0;
    for (std::size_t m = 0; m < budgets(); ++m) {
      if (total[m] <= problem_.limit[m]) continue;
      sum += static_cast<double>(total[m] - problem_.limit[m]) /
             static_cast<double>(std::max<std::int64_t>(problem_.limit[m], 1));
    }
    return sum;
  }

  double priced(const Change& change) const {
    return lists_.priced(change.level, multipliers_) -
           lists_.priced(choice_[at(change.layer)], multipliers_);
  }

  // What a change draws on the budgets, at these multipliers.
  double charge(const Change& change) const {
    const std::size_t from = at(choice_[at(change.layer)]), to = at(change.level);
    double sum = 0.0;
    for (std::size_t m = 0; m < budgets(); ++m) {
      sum += std::max(0.0, multipliers_[m] * (lists_.share[m][to] - lists_.share[m][from]));
    }
    return sum;
  }

  void apply(const Change& change) {
    total_ = total_after(change);
    choice_[at(change.layer)] = change.level;
  }

  const ReducedKnapsack& problem_;
  const LevelLists& lists_;
  const PerBudget& multipliers_;
  LevelChoice choice_;
  Totals total_{};
};

}  // namespace

void repair_plan(const ReducedKnapsack& problem, const LevelLists& lists, LevelChoice choice,
                 const PerBudget& multipliers, Incumbent* incumbent) {
  Repair repair(problem, lists, std::move(choice), multipliers);
  if (!repair.shrink()) return;
  repair.grow();
  repair.offer(incumbent);
}

}  // namespace fitcompress
