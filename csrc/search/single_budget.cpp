#include "search/single_budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "search/convex_front.h"
#include "search/remaining_layers.h"

namespace fitcompress {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// What is not better by more is rounding.
constexpr double kRounding = 1e-13;
// Partial plans of one stage, and of all stages together (8 bytes each).
constexpr std::size_t kMostPlans = std::size_t{1} << 18;
constexpr std::size_t kMostSteps = std::size_t{1} << 25;

// The level of a layer, and where those before it are; −1: nowhere.
struct Step {
  std::int32_t before;
  std::int32_t level;
};

// Changes to the break plan in the layers added so far.
struct PartialPlan {
  std::int64_t cost;
  double value;
  Step last;
};

class SingleBudget {
 public:
  SingleBudget(const ReducedKnapsack& problem, double gap, Watch* watch)
      : levels_(problem.levels), gap_(gap), watch_(*watch), edges_(convex_front(levels_)) {
    limit_ = problem.limit[0];
  }

  KnapsackResult run(const LevelChoice& known) {
    KnapsackResult result;
    find_break_plan();
    best_choice_ = break_;
    improve_by_one_change();
    compare_with(known);
    add_layers();
    const bool solved = !watch_.stopped() && dropped_ >= target();
    const double proven =
        watch_.stopped() ? bound_ : std::max(bound_, std::min(dropped_, target()));
    result.status = solved ? KnapsackStatus::kSolved : KnapsackStatus::kStopped;
    result.choice = best_choice_;
    result.bound = base_ + std::min(best_, proven);
    result.nodes = static_cast<std::int64_t>(steps_.size());
    return result;
  }

 private:
  std::int64_t cost(std::int32_t level) const {
    return levels_.cost[0][static_cast<std::size_t>(level)];
  }
  double value(std::int32_t level) const { return levels_.value[static_cast<std::size_t>(level)]; }
  std::int32_t first(std::int32_t layer) const {
    return levels_.begin[static_cast<std::size_t>(layer)];
  }
  std::int32_t end(std::int32_t layer) const {
    return levels_.begin[static_cast<std::size_t>(layer) + 1];
  }
  std::int32_t break_level(std::int32_t layer) const {
    return break_[static_cast<std::size_t>(layer)];
  }

  // Partial plans that cannot get below this are of no use. Values are relative to the break plan.
  double target() const {
    const double total = std::abs(base_ + best_);
    return best_ - std::max(gap_ * total, kRounding * std::max(total, size_));
  }

  // value + μ·cost of a change to the break plan; at least 0, but for rounding.
  double reduced(std::int32_t layer, std::int32_t level) const {
    const std::int32_t from = break_level(layer);
    return value(level) - value(from) + rate_ * static_cast<double>(cost(level) - cost(from));
  }

  void find_break_plan() {
    std::int64_t total = 0;
    base_ = 0.0;
    for (std::int32_t l = 0; l < levels_.layers(); ++l) {
      break_.push_back(first(l));
      total += cost(first(l));
    }
    for (; split_ < edges_.size(); ++split_) {
      const HullEdge& edge = edges_[split_];
      if (total + edge.cost > limit_) break;
      total += edge.cost;
      break_[static_cast<std::size_t>(edge.layer)] = edge.to;
    }
    for (const std::int32_t level : break_) {
      base_ += value(level);
      size_ += std::abs(value(level));
    }
    room_ = limit_ - total;
    rate_ = edges_[split_].rate;
    bound_ = -rate_ * static_cast<double>(room_);
  }

  void improve_by_one_change() {
    for (std::int32_t l = 0; l < levels_.layers(); ++l) {
      const std::int32_t from = break_level(l);
      for (std::int32_t k = first(l); k < end(l); ++k) {
        const double gain = value(k) - value(from);
        if (cost(k) - cost(from) > room_ || gain >= best_) continue;
        best_ = gain;
        best_choice_ = break_;
        best_choice_[static_cast<std::size_t>(l)] = k;
      }
    }
  }

  void compare_with(const LevelChoice& known) {
    if (known.empty()) return;
    double sum = 0.0;
    for (const std::int32_t level : known) sum += value(level);
    if (sum - base_ >= best_) return;
    best_ = sum - base_;
    best_choice_ = known;
  }

  // Those with the dearest level first: what is left to decide gets ever finer.
  std::vector<std::int32_t> largest_first() const {
    std::vector<std::int32_t> order(break_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return cost(break_level(a)) > cost(break_level(b));
    });
    return order;
  }

  // Whether another level might help.
  bool in_doubt(std::int32_t layer) const {
    const double room = target() - bound_;
    for (std::int32_t k = first(layer); k < end(layer); ++k) {
      if (k != break_level(layer) && reduced(layer, k) < room) return true;
    }
    return false;
  }

  void add_layers() {
    if (bound_ >= target()) return;
    std::vector<PartialPlan> plans{{0, 0.0, {-1, -1}}};
    RemainingLayers rest(edges_, split_, levels_.layers());
    for (const std::int32_t layer : largest_first()) {
      if (!in_doubt(layer)) continue;
      if (bound_ >= target() || plans.empty()) return;
      rest.remove(layer, target() - bound_);
      add_layer(layer, rest, &plans);
      if (watch_.stopped()) return;
    }
  }

  void add_layer(std::int32_t layer, const RemainingLayers& rest, std::vector<PartialPlan>* plans) {
    std::vector<std::vector<PartialPlan>> runs;
    for (std::int32_t k = first(layer); k < end(layer); ++k) {
      if (k != break_level(layer) && reduced(layer, k) >= target() - bound_) continue;
      std::vector<PartialPlan> run = changed(*plans, layer, k, rest);
      if (!run.empty()) runs.push_back(std::move(run));
      if (watch_.says_stop(base_ + best_, base_ + bound_)) return;
    }
    while (runs.size() > 1) {
      std::vector<std::vector<PartialPlan>> merged;
      for (std::size_t i = 0; i + 1 < runs.size(); i += 2) {
        merged.push_back(merge(runs[i], runs[i + 1]));
      }
      if (runs.size() % 2 == 1) merged.push_back(std::move(runs.back()));
      runs = std::move(merged);
    }
    plans->clear();
    if (runs.empty()) return;
    *plans = std::move(runs[0]);
    // Better plans may have come to light since a plan was let in.
    const double worst = target();
    const auto hopeless = [&](const PartialPlan& plan) {
      return plan.value + rest.relaxed(room_ - plan.cost).value >= worst;
    };
    plans->erase(std::remove_if(plans->begin(), plans->end(), hopeless), plans->end());
    keep_within_memory(rest, plans);
    for (const PartialPlan& plan : *plans) steps_.push_back(plan.last);
  }

  // Where the level that a plan got last is.
  std::int32_t last_step(const std::vector<PartialPlan>& plans, std::size_t plan) const {
    if (steps_.empty()) return -1;
    return static_cast<std::int32_t>(steps_.size() - plans.size() + plan);
  }

  // The plans with one more layer changed, without those that are hopeless; keeps the best plan.
  std::vector<PartialPlan> changed(const std::vector<PartialPlan>& plans, std::int32_t layer,
                                   std::int32_t level, const RemainingLayers& rest) {
    const std::int64_t more = cost(level) - cost(break_level(layer));
    const double change = value(level) - value(break_level(layer));
    double worst = target();
    std::vector<PartialPlan> run;
    for (std::size_t i = 0; i < plans.size(); ++i) {
      const Step last{last_step(plans, i), level};
      const PartialPlan next{plans[i].cost + more, plans[i].value + change, last};
      const Relaxation rest_of_plan = rest.relaxed(room_ - next.cost);
      if (next.value + rest_of_plan.rounded < best_) {
        best_ = next.value + rest_of_plan.rounded;
        remember(last, rest, rest_of_plan);
        worst = target();
      }
      if (next.value + rest_of_plan.value < worst) run.push_back(next);
    }
    return run;
  }

  void remember(Step last, const RemainingLayers& rest, const Relaxation& relaxation) {
    best_choice_ = break_;
    rest.apply(relaxation, &best_choice_);
    for (;;) {
      const auto after = std::upper_bound(levels_.begin.begin(), levels_.begin.end(), last.level);
      best_choice_[static_cast<std::size_t>(after - levels_.begin.begin() - 1)] = last.level;
      if (last.before < 0) return;
      last = steps_[static_cast<std::size_t>(last.before)];
    }
  }

  // By rising cost and falling value.
  static std::vector<PartialPlan> merge(const std::vector<PartialPlan>& a,
                                        const std::vector<PartialPlan>& b) {
    std::vector<PartialPlan> merged;
    merged.reserve(a.size() + b.size());
    for (auto p = a.begin(), q = b.begin(); p != a.end() || q != b.end();) {
      const bool take_p = q == b.end() || (p != a.end() && std::tie(p->cost, p->value) <=
                                                               std::tie(q->cost, q->value));
      const PartialPlan& next = take_p ? *p++ : *q++;
      if (merged.empty() || next.value < merged.back().value) merged.push_back(next);
    }
    return merged;
  }

  // Drops the least promising plans, if there are too many, and with them the proof.
  void keep_within_memory(const RemainingLayers& rest, std::vector<PartialPlan>* plans) {
    const std::size_t left = kMostSteps - std::min(kMostSteps, steps_.size());
    const std::size_t most = std::max<std::size_t>(std::min(kMostPlans, left / 8), 64);
    if (plans->size() <= most) return;
    std::vector<double> bounds;
    for (const PartialPlan& plan : *plans) {
      bounds.push_back(plan.value + rest.relaxed(room_ - plan.cost).value);
    }
    std::vector<double> sorted = bounds;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(most),
                     sorted.end());
    const double cut = sorted[most];
    dropped_ = std::min(dropped_, cut);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < plans->size(); ++i) {
      const bool tie = bounds[i] == cut && kept < most;
      if (bounds[i] < cut || tie) (*plans)[kept++] = (*plans)[i];
    }
    plans->resize(kept);
  }

  const LevelLists& levels_;
  const double gap_;
  Watch& watch_;
  std::int64_t limit_;
  const std::vector<HullEdge> edges_;
  std::size_t split_ = 0;  // the first edge that does not fit
  LevelChoice break_;
  double base_ = 0.0;      // value of the break plan, to which all others are relative
  double size_ = 0.0;      // sum of the magnitudes of its values
  std::int64_t room_ = 0;  // that it leaves
  double rate_ = 0.0;      // of the edge that does not fit: the multiplier
  double bound_ = 0.0;
  double best_ = 0.0;
  LevelChoice best_choice_;
  double dropped_ = kInfinity;  // no plan that was dropped for want of memory is better
  std::vector<Step> steps_;
};

}  // namespace

KnapsackResult solve_single_budget(const ReducedKnapsack& problem, double gap,
                                   const LevelChoice& known, Watch* watch) {
  return SingleBudget(problem, gap, watch).run(known);
}

}  // namespace fitcompress
