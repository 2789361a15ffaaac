#include "search/branch_and_bound.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "search/level_set.h"
#include "search/multipliers.h"
#include "search/plan_repair.h"

namespace fitcompress {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1e-13;  // of a value; what is not better by more is rounding
constexpr int kMostPlansAtRoot = 300;
constexpr int kMostPlansInNode = 40;
constexpr std::int64_t kMostBytes = std::int64_t{1} << 30;  // of open nodes

struct Node {
  double bound;
  std::int64_t order;  // of creation
  std::vector<PerBudget> start;
  LevelSet levels;
};

bool comes_later(const Node& a, const Node& b) {
  return a.bound != b.bound ? a.bound > b.bound : a.order > b.order;
}

// Where the levels of a layer are cut in two.
struct Cut {
  std::int32_t layer = -1;
  std::size_t budget = 0;
  double share = 0.0;       // up to this, and the rest
  std::int32_t level = -1;  // if ≥ 0: before this one, and the rest
};

class BranchAndBound {
 public:
  BranchAndBound(const ReducedKnapsack& problem, double gap, std::int64_t most_nodes, Watch* watch)
      : problem_(problem), gap_(gap), most_nodes_(most_nodes), watch_(*watch) {}

  KnapsackResult run() {
    begin();
    double proven = kInfinity;
    while (!open_.empty()) {
      const bool dive = incumbent_.value == kInfinity;
      const Node node = take(dive);
      // While diving, the lowest bound is somewhere among the open nodes.
      proven = dive ? lowest(node) : node.bound;
      if (!dive && node.bound >= target()) break;
      if (nodes_ == most_nodes_ || watch_.says_stop(incumbent_.value, proven) || out_of_memory()) {
        return result(KnapsackStatus::kStopped, proven);
      }
      ++nodes_;
      visit(node);
    }
    if (incumbent_.value == kInfinity) return result(KnapsackStatus::kInfeasible, kInfinity);
    return result(KnapsackStatus::kSolved, open_.empty() ? target() : std::max(proven, target()));
  }

 private:
  static std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

  double target() const {
    if (incumbent_.value == kInfinity) return kOutOfReach;
    const double size = std::abs(incumbent_.value);
    return incumbent_.value - std::max(gap_, kRounding) * size;
  }

  void begin() {
    const LevelLists& all = problem_.levels;
    const Relaxed relaxed = maximise_bound(all, {PerBudget{}}, kOutOfReach, 1e-7, kMostPlansAtRoot);
    if (relaxed.bound >= kOutOfReach) return;
    repair_at_root(relaxed);
    open_.push_back(Node{relaxed.bound, 0, starts(relaxed), useful(all, relaxed, Cut{}, true)});
  }

  // Looks at levels of small reduced cost only, for speed and since those are the good ones.
  void repair_at_root(const Relaxed& relaxed) {
    const LevelLists& all = problem_.levels;
    LevelChoice choice(at(all.layers()));
    PricedPlan plan;
    for (double room = 1e-4 * std::abs(relaxed.bound) + 1e-12;; room *= 10.0) {
      best_plan(all, relaxed.multipliers, &plan, &choice);
      LevelSet near = near_levels(all, relaxed.multipliers, choice, room);
      std::vector<LevelChoice> mixed;
      for (const MixedPlan& part : relaxed.mix) {
        best_plan(all, part.multipliers, &plan, &choice);
        for (const std::int32_t level : choice) near.insert(level);
        mixed.push_back(choice);
      }
      LevelLists lists;
      near.select(all, &lists);
      for (LevelChoice& one : mixed) {
        for (std::size_t l = 0; l < one.size(); ++l) {  // the same level within the selection
          const auto first = lists.origin.begin() + lists.begin[l];
          const auto found =
              std::lower_bound(first, lists.origin.begin() + lists.begin[l + 1], one[l]);
          one[l] = static_cast<std::int32_t>(found - lists.origin.begin());
        }
        repair_plan(problem_, lists, one, relaxed.multipliers, &incumbent_);
      }
      if (incumbent_.value < kInfinity || lists.size() == all.size()) return;
    }
  }

  // Levels that are less than `room` worse than the best of their layer.
  static LevelSet near_levels(const LevelLists& lists, const PerBudget& multipliers,
                              const LevelChoice& best, double room) {
    LevelSet near(lists.size());
    for (std::int32_t l = 0; l < lists.layers(); ++l) {
      const double least = lists.priced(best[at(l)], multipliers);
      for (std::int32_t k = lists.begin[at(l)]; k < lists.begin[at(l) + 1]; ++k) {
        if (lists.priced(k, multipliers) - least < room || k == best[at(l)]) near.insert(k);
      }
    }
    return near;
  }

  Node take(bool dive) {
    if (!dive) std::pop_heap(open_.begin(), open_.end(), comes_later);
    Node node = std::move(open_.back());
    open_.pop_back();
    return node;
  }

  double lowest(const Node& taken) const {
    double bound = taken.bound;
    for (const Node& node : open_) bound = std::min(bound, node.bound);
    return bound;
  }

  bool out_of_memory() const {
    const auto bytes = static_cast<std::int64_t>(open_.size()) * (problem_.levels.size() / 8 + 256);
    return bytes > kMostBytes;
  }

  void visit(const Node& node) {
    LevelLists lists;
    if (!node.levels.select(problem_.levels, &lists)) return;
    const double room = target();
    Relaxed relaxed = maximise_bound(lists, node.start, room, 1e-9, kMostPlansInNode);
    relaxed.bound = std::max(relaxed.bound, node.bound);
    if (relaxed.bound >= room) return;
    const bool none = incumbent_.value == kInfinity;
    std::vector<LevelChoice> mixed;
    PricedPlan plan;
    for (const MixedPlan& part : relaxed.mix) {
      mixed.emplace_back(at(lists.layers()));
      best_plan(lists, part.multipliers, &plan, &mixed.back());
      repair_plan(problem_, lists, mixed.back(), relaxed.multipliers, &incumbent_);
    }
    if (lists.size() == lists.layers()) {  // one level each: a plan or nothing
      LevelChoice only(at(lists.layers()));
      for (std::int32_t l = 0; l < lists.layers(); ++l) only[at(l)] = l;
      repair_plan(problem_, lists, only, relaxed.multipliers, &incumbent_);
    } else if (relaxed.bound < target()) {
      branch(lists, relaxed, choose_cut(lists, relaxed, mixed));
    }
    if (none && incumbent_.value < kInfinity) {
      std::make_heap(open_.begin(), open_.end(), comes_later);
    }
  }

  // Where the plans of the mixture differ most, else in the middle of the longest list.
  static Cut choose_cut(const LevelLists& lists, const Relaxed& relaxed,
                        const std::vector<LevelChoice>& mixed) {
    Cut cut;
    double most = 0.0;
    for (std::int32_t l = 0; l < lists.layers(); ++l) {
      const auto differs = [&](const LevelChoice& plan) { return plan[at(l)] != mixed[0][at(l)]; };
      if (std::none_of(mixed.begin(), mixed.end(), differs)) continue;
      for (std::size_t m = 0; m < at(lists.budgets); ++m) {
        double mean = 0.0, weights = 0.0, spread = 0.0;
        for (std::size_t i = 0; i < mixed.size(); ++i) {
          mean += relaxed.mix[i].weight * lists.share[m][at(mixed[i][at(l)])];
          weights += relaxed.mix[i].weight;
        }
        mean /= weights;
        for (std::size_t i = 0; i < mixed.size(); ++i) {
          spread += relaxed.mix[i].weight * std::abs(lists.share[m][at(mixed[i][at(l)])] - mean);
        }
        spread *= relaxed.multipliers[m];
        if (spread > most && separates(lists, l, m, mean)) {
          most = spread;
          cut = {l, m, mean, -1};
        }
      }
    }
    if (cut.layer >= 0) return cut;
    std::int32_t longest = 1;
    for (std::int32_t l = 0; l < lists.layers(); ++l) {
      const std::int32_t length = lists.begin[at(l) + 1] - lists.begin[at(l)];
      if (length <= longest) continue;
      longest = length;
      cut = {l, 0, 0.0, lists.begin[at(l)] + length / 2};
    }
    return cut;
  }

  static bool separates(const LevelLists& lists, std::int32_t layer, std::size_t budget,
                        double share) {
    bool below = false, above = false;
    for (std::int32_t k = lists.begin[at(layer)]; k < lists.begin[at(layer) + 1]; ++k) {
      const bool small = lists.share[budget][at(k)] <= share;
      below = below || small;
      above = above || !small;
    }
    return below && above;
  }

  // The levels of one side that may be in a plan below the target, as a set of the problem's.
  LevelSet useful(const LevelLists& lists, const Relaxed& relaxed, const Cut& cut,
                  bool first_side) const {
    const bool whole = &lists == &problem_.levels;
    LevelSet set(problem_.levels.size());
    LevelChoice best(at(lists.layers()));
    PricedPlan plan;
    const double room = target() - best_plan(lists, relaxed.multipliers, &plan, &best);
    for (std::int32_t l = 0; l < lists.layers(); ++l) {
      const double least = lists.priced(best[at(l)], relaxed.multipliers);
      for (std::int32_t k = lists.begin[at(l)]; k < lists.begin[at(l) + 1]; ++k) {
        if (lists.priced(k, relaxed.multipliers) - least >= room) continue;
        if (l == cut.layer) {
          const bool first =
              cut.level >= 0 ? k < cut.level : lists.share[cut.budget][at(k)] <= cut.share;
          if (first != first_side) continue;
        }
        set.insert(whole ? k : lists.origin[at(k)]);
      }
    }
    return set;
  }

  static std::vector<PerBudget> starts(const Relaxed& relaxed) {
    std::vector<PerBudget> start{relaxed.multipliers};
    for (const MixedPlan& part : relaxed.mix) {
      if (part.multipliers != relaxed.multipliers) start.push_back(part.multipliers);
    }
    return start;
  }

  void branch(const LevelLists& lists, const Relaxed& relaxed, const Cut& cut) {
    const std::vector<PerBudget> start = starts(relaxed);
    for (const bool first_side : {false, true}) {
      open_.push_back(
          Node{relaxed.bound, ++created_, start, useful(lists, relaxed, cut, first_side)});
      if (incumbent_.value < kInfinity) std::push_heap(open_.begin(), open_.end(), comes_later);
    }
  }

  KnapsackResult result(KnapsackStatus status, double bound) const {
    KnapsackResult result;
    result.status = status;
    result.choice = incumbent_.choice;
    result.bound = std::min(bound, incumbent_.value);
    result.nodes = nodes_;
    return result;
  }

  const ReducedKnapsack& problem_;
  const double gap_;
  const std::int64_t most_nodes_;
  Watch& watch_;
  Incumbent incumbent_;
  std::vector<Node> open_;  // a heap once a plan is known
  std::int64_t created_ = 0;
  std::int64_t nodes_ = 0;
};

}  // namespace

KnapsackResult branch_and_bound(const ReducedKnapsack& problem, double gap, std::int64_t most_nodes,
                                Watch* watch) {
  return BranchAndBound(problem, gap, most_nodes, watch).run();
}

}  // namespace fitcompress
