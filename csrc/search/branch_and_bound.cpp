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
constexpr std::int64_t kFirstNodes = 40;
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
  // best: the value to beat; ∞: none.
  BranchAndBound(const ReducedKnapsack& problem, double gap, double best, std::int64_t most_nodes,
                 Watch* watch)
      : problem_(problem), gap_(gap), most_nodes_(most_nodes), watch_(*watch) {
    incumbent_.value = best;
    incumbent_.size = std::abs(best);
  }

  KnapsackResult run() {
    begin();
    return visit_nodes(most_nodes_);
  }

  // As run(), without the layers that the root decides: passes over all levels are what a node
  // takes. A few nodes first, for a better plan to decide them by.
  KnapsackResult run_on_rest() {
    const Relaxed root = begin();
    const KnapsackResult first = visit_nodes(std::min(kFirstNodes, most_nodes_));
    if (nodes_ < kFirstNodes || watch_.stopped()) return first;
    if (incumbent_.value == kInfinity || root.bound >= target()) return visit_nodes(most_nodes_);
    Rest rest = undecided(useful(problem_.levels, root, Cut{}, true));
    const auto layers = static_cast<std::int32_t>(rest.layer.size());
    const bool small = layers > 0 && 2 * layers <= problem_.levels.layers();
    // If the decided layers alone are too dear, no better plan is left; a few nodes will show it.
    if (!small || !rest.problem.within({})) return visit_nodes(most_nodes_);
    const double fixed = rest.problem.fixed_value;
    BranchAndBound search(rest.problem, gap_, incumbent_.value - fixed, most_nodes_, &watch_);
    KnapsackResult result = search.run();
    result.bound = std::min({result.bound + fixed, dropped_, incumbent_.value});
    result.nodes += nodes_;
    if (result.choice.empty()) {
      result.choice = incumbent_.choice;
    } else {
      for (std::size_t i = 0; i < rest.layer.size(); ++i) {
        const auto level = at(result.choice[i]);
        rest.decided[rest.layer[i]] = rest.problem.levels.origin[level];
      }
      result.choice = std::move(rest.decided);
    }
    return result;
  }

 private:
  KnapsackResult visit_nodes(std::int64_t most) {
    while (!open_.empty()) {
      const bool dive = incumbent_.value == kInfinity;
      if (nodes_ == most) return result(KnapsackStatus::kStopped, lowest());
      const Node node = take(dive);
      // While diving, the lowest bound is somewhere among the open nodes.
      const double proven = dive ? std::min(lowest(), node.bound) : node.bound;
      if (!dive && node.bound >= target()) {
        dropped_ = std::min(dropped_, node.bound);  // and all others are no better
        break;
      }
      const double fixed = problem_.fixed_value;
      if (watch_.says_stop(incumbent_.value + fixed, std::min(proven, dropped_) + fixed) ||
          out_of_memory()) {
        return result(KnapsackStatus::kStopped, proven);
      }
      ++nodes_;
      visit(node);
    }
    if (incumbent_.value == kInfinity) return result(KnapsackStatus::kInfeasible, kInfinity);
    return result(KnapsackStatus::kSolved, kInfinity);
  }

  static std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

  double target() const {
    if (incumbent_.value == kInfinity) return kOutOfReach;
    const double total = std::abs(incumbent_.value + problem_.fixed_value);
    return incumbent_.value - std::max(gap_ * total, kRounding * std::max(total, incumbent_.size));
  }

  Relaxed begin() {
    const LevelLists& all = problem_.levels;
    const Relaxed relaxed = maximise_bound(all, {PerBudget{}}, kOutOfReach, 1e-7, kMostPlansAtRoot);
    if (relaxed.bound >= kOutOfReach) return relaxed;
    repair_at_root(relaxed);
    open_.push_back(Node{relaxed.bound, 0, starts(relaxed), useful(all, relaxed, Cut{}, true)});
    return relaxed;
  }

  // The layers that have a choice, as a problem of their own.
  struct Rest {
    ReducedKnapsack problem;
    std::vector<std::size_t> layer;  // of each of its lists
    LevelChoice decided;             // all others have their level
  };

  Rest undecided(const LevelSet& levels) const {
    const LevelLists& all = problem_.levels;
    Rest rest{
        {true, {}, problem_.limit, {}, problem_.scale, 0.0}, {}, LevelChoice(at(all.layers()))};
    LevelLists& lists = rest.problem.levels;
    lists.budgets = all.budgets;
    for (std::int32_t l = 0; l < all.layers(); ++l) {
      const std::int32_t before = lists.size();
      for (std::int32_t k = all.begin[at(l)]; k < all.begin[at(l) + 1]; ++k) {
        if (levels.contains(k)) lists.add(all, k);
      }
      if (lists.size() > before + 1) {
        rest.layer.push_back(at(l));
        lists.end_layer();
        continue;
      }
      // Decided: off the budgets, and off the list again.
      const std::int32_t level = lists.origin.back();
      rest.decided[at(l)] = level;
      rest.problem.fixed_value += all.value[at(level)];
      for (std::size_t m = 0; m < at(all.budgets); ++m) {
        rest.problem.limit[m] -= all.cost[m][at(level)];
      }
      lists.pop();
    }
    for (std::size_t m = 0; m < at(all.budgets); ++m) {
      const double limit = static_cast<double>(std::max<std::int64_t>(rest.problem.limit[m], 1));
      for (std::size_t k = 0; k < lists.share[m].size(); ++k) {
        lists.share[m][k] = static_cast<double>(lists.cost[m][k]) / limit;
      }
    }
    return rest;
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

  double lowest() const {
    double bound = kInfinity;
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
    if (relaxed.bound >= room) {
      dropped_ = std::min(dropped_, relaxed.bound);
      return;
    }
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
    } else {
      dropped_ = std::min(dropped_, relaxed.bound);
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
                  bool first_side) {
    const bool whole = &lists == &problem_.levels;
    LevelSet set(problem_.levels.size());
    LevelChoice best(at(lists.layers()));
    PricedPlan plan;
    const double bound = best_plan(lists, relaxed.multipliers, &plan, &best);
    const double room = target() - bound;
    for (std::int32_t l = 0; l < lists.layers(); ++l) {
      const double least = lists.priced(best[at(l)], relaxed.multipliers);
      for (std::int32_t k = lists.begin[at(l)]; k < lists.begin[at(l) + 1]; ++k) {
        const double more = lists.priced(k, relaxed.multipliers) - least;
        if (more >= room) {
          dropped_ = std::min(dropped_, bound + more);
          continue;
        }
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
    result.bound = std::min({bound, dropped_, incumbent_.value});
    result.nodes = nodes_;
    return result;
  }

  const ReducedKnapsack& problem_;
  const double gap_;
  const std::int64_t most_nodes_;
  Watch& watch_;
  Incumbent incumbent_;
  std::vector<Node> open_;      // a heap once a plan is known
  double dropped_ = kInfinity;  // no plan that was left out is better
  std::int64_t created_ = 0;
  std::int64_t nodes_ = 0;
};

}  // namespace

KnapsackResult branch_and_bound(const ReducedKnapsack& problem, double gap, std::int64_t most_nodes,
                                Watch* watch) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  return BranchAndBound(problem, gap, kNone, most_nodes, watch).run_on_rest();
}

}  // namespace fitcompress
