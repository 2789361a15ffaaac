#include "search/plan_repair.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace fitcompress {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

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

  // Changes of the least price for what they take off the overdraft, until there is none. Returns
  // whether the plan is within the budgets now.
  bool shrink() {
    double overdraft = over(total_);
    const auto rate = [&](const Change& change) {
      const double left = over(total_after(change));
      return left < overdraft ? std::max(priced(change), 0.0) / (overdraft - left) : kNever;
    };
    make_changes(rate, [&] { return (overdraft = over(total_)) > 0.0; });
    return !(overdraft > 0.0);
  }

  // Changes that draw the least on the budgets for what they gain, while there are any.
  void grow() {
    const auto rate = [&](const Change& change) {
      const double gain = value(choice_[at(change.layer)]) - value(change.level);
      if (!(gain > 0.0) || !problem_.within(total_after(change))) return kNever;
      return (1e-9 + charge(change)) / gain;
    };
    make_changes(rate, [] { return true; });
  }

  void offer(Incumbent* incumbent) const {
    double sum = 0.0, size = 0.0;
    for (const std::int32_t level : choice_) {
      sum += value(level);
      size += std::abs(value(level));
    }
    if (sum >= incumbent->value) return;
    incumbent->value = sum;
    incumbent->size = size;
    incumbent->choice.clear();
    for (const std::int32_t level : choice_) incumbent->choice.push_back(lists_.origin[at(level)]);
  }

 private:
  struct Change {
    std::int32_t layer = -1;
    std::int32_t level = 0;
    double rate = kNever;
  };

  static std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }
  std::size_t budgets() const { return static_cast<std::size_t>(lists_.budgets); }
  double value(std::int32_t level) const { return lists_.value[at(level)]; }

  static bool is_worse(const Change& a, const Change& b) {
    return a.rate != b.rate ? a.rate > b.rate : a.layer > b.layer;
  }

  template <class Rate>
  Change best_change(std::int32_t layer, const Rate& rate) const {
    Change best;
    for (std::int32_t k = lists_.begin[at(layer)]; k < lists_.begin[at(layer) + 1]; ++k) {
      Change change{layer, k};
      if (k == choice_[at(layer)]) continue;
      change.rate = rate(change);
      if (change.rate < best.rate) best = change;
    }
    return best;
  }

  // The change of the least rate first, as long as `more`. Rates mostly rise with the changes that
  // are made, so that a layer is looked at anew when its last known rate is the least one; where
  // they fall, the next pass over all layers sees it.
  template <class Rate, class More>
  void make_changes(const Rate& rate, const More& more) {
    for (bool changed = true; changed && more();) {
      changed = false;
      heap_.clear();
      for (std::int32_t l = 0; l < lists_.layers(); ++l) push(best_change(l, rate));
      while (!heap_.empty() && more()) {
        std::pop_heap(heap_.begin(), heap_.end(), is_worse);
        const std::int32_t layer = heap_.back().layer;
        heap_.pop_back();
        const Change now = best_change(layer, rate);
        if (now.rate < kNever && (heap_.empty() || !is_worse(now, heap_.front()))) {
          total_ = total_after(now);
          choice_[at(layer)] = now.level;
          changed = true;
        }
        push(now);
      }
    }
  }

  void push(const Change& change) {
    if (!(change.rate < kNever)) return;
    heap_.push_back(change);
    std::push_heap(heap_.begin(), heap_.end(), is_worse);
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

  const ReducedKnapsack& problem_;
  const LevelLists& lists_;
  const PerBudget& multipliers_;
  LevelChoice choice_;
  Totals total_{};
  std::vector<Change> heap_;
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
