#include "search/path_search.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "search/path_cells.h"
#include "search/path_frontier.h"
#include "search/path_keys.h"
#include "search/path_nodes.h"

namespace fitcompress {
namespace {

// Expansions between two calls of `watch`: about a millisecond.
constexpr std::int64_t kWatchEvery = 1 << 10;
// Of nodes, open or not: several million of them for twenty layers.
constexpr std::size_t kMostBytes = std::size_t{1} << 30;

class Search {
 public:
  Search(const PathTables& tables, const PathOptions& options, const Measure& measure, bool exact,
         const PathWatch& watch)
      : tables_(tables),
        options_(options),
        watch_(watch),
        cells_(tables),
        metric_(cells_, {options.budget, options.lam / static_cast<double>(options.reference_cost)},
                measure, exact),
        nodes_(tables.layers),
        children_(tables.layers) {
    switch (options.mode) {
      case PathMode::kGreedy:
        frontier_ = greedy_frontier();
        break;
      case PathMode::kBeam:
        frontier_ = beam_frontier(nodes_, options.beam_width);
        break;
      case PathMode::kBestFirst:
        frontier_ = full_frontier(nodes_, cells_, !metric_.moves());
        break;
    }
  }

  PathResult run() {
    try {
      return walk();
    } catch (const PathInterrupted&) {
      return best_so_far(PathStatus::kInterrupted);
    }
  }

 private:
  PathResult walk() {
    const Levels cheapest = tables_.cheapest();
    if (options_.budget < tables_.total_cost(cheapest)) {
      return finish(straight_to(tables_, cheapest), PathStatus::kExhausted);
    }
    std::int32_t id = nodes_.add_start(options_.start_length, tables_.total_cost(finest(tables_)));
    visit(id, nodes_[id].g + metric_.h_of_start(nodes_[id]));
    for (;;) {
      const Node& node = nodes_[id];
      if (node.cost <= options_.budget) return within(moves_to(id), node.g, PathStatus::kReached);
      if (node.cost < nodes_[cheapest_].cost) cheapest_ = id;
      const PathOrder order = orders();
      if (order == PathOrder::kInterrupt) return best_so_far(PathStatus::kInterrupted);
      if (order == PathOrder::kGiveUp) return best_so_far(PathStatus::kLimit);
      ++expansions_;
      metric_.expand(id, node, &children_);
      note_goals(id);
      frontier_->add(id, children_);
      Open next;
      if (!frontier_->take(&next)) {
        return best_so_far(goal_.parent < 0 ? PathStatus::kExhausted : PathStatus::kReached);
      }
      const double g =
          nodes_[next.parent].g + metric_.length(next.parent, nodes_[next.parent], next.step);
      id = nodes_.add(next.parent, next.step, g, next.cost);
      visit(id, next.f);
    }
  }

  PathOrder orders() {
    if (expansions_ == options_.max_expansions) return PathOrder::kGiveUp;
    if (expansions_ % kWatchEvery != 0 && !metric_.moves()) return PathOrder::kGoOn;
    if (nodes_.bytes() + frontier_->bytes() > kMostBytes) return PathOrder::kGiveUp;
    return watch_({expansions_, nodes_[cheapest_].cost});
  }

  // Remembers the best child within the budget.
  void note_goals(std::int32_t id) {
    const auto steps = static_cast<Step>(children_.f.size());
    for (Step i = 0; i < steps; ++i) {
      const auto k = static_cast<std::size_t>(i);
      if (options_.budget < children_.cost[k]) continue;
      const Open child{children_.f[k], children_.cost[k], id, i};
      if (child.f < KeyTable::kNone && child < goal_) goal_ = child;
    }
  }

  void visit(std::int32_t id, double f) {
    if (!options_.trace) return;
    const Node& node = nodes_[id];
    Levels levels = finest(tables_);
    for (std::size_t l = 0; l < levels.grids.size(); ++l) levels.grids[l] = Grid(node.levels()[l]);
    levels.sparsity = Sparsity(node.levels()[tables_.layers]);
    trace_.push_back({std::move(levels), node.g, f, node.cost});
  }

  Move move_of(const Node& parent, Step step) const {
    const Layer layer = step == cells_.pruning() ? kSparsityMove : Layer(step);
    return {layer, parent.levels()[step] + 1};
  }

  std::vector<Move> moves_to(std::int32_t id) const {
    std::vector<Move> moves;
    for (; nodes_[id].parent >= 0; id = nodes_[id].parent) {
      moves.push_back(move_of(nodes_[nodes_[id].parent], nodes_[id].step));
    }
    std::reverse(moves.begin(), moves.end());
    return moves;
  }

  PathResult best_so_far(PathStatus status) {
    if (goal_.parent < 0) return finish(moves_to(cheapest_), status, nodes_[cheapest_].g);
    const Node& parent = nodes_[goal_.parent];
    std::vector<Move> moves = moves_to(goal_.parent);
    moves.push_back(move_of(parent, goal_.step));
    const double step = metric_.length(goal_.parent, parent, goal_.step);
    return within(std::move(moves), parent.g + step, status);
  }

  PathResult within(std::vector<Move> moves, double g, PathStatus status) {
    return finish(filled(tables_, std::move(moves), options_.budget), status, g);
  }

  PathResult finish(std::vector<Move> moves, PathStatus status, double g = 0.0) {
    Levels levels = levels_after(tables_, moves);
    if (!metric_.moves()) g = length_of(tables_, moves, options_.start_length);
    const double distortion = tables_.sum(tables_.distortion, levels);
    const Cost cost = tables_.total_cost(levels);
    return {std::move(levels), g,      distortion,       cost,
            expansions_,       status, std::move(moves), std::move(trace_)};
  }

  const PathTables& tables_;
  const PathOptions& options_;
  const PathWatch& watch_;
  PathCells cells_;
  PathMetric metric_;
  NodeStore nodes_;
  Children children_;
  std::unique_ptr<Frontier> frontier_;
  std::int32_t cheapest_ = 0;                   // of the nodes
  Open goal_{KeyTable::kNone, Cost(), -1, -1};  // the best known within the budget
  std::int64_t expansions_ = 0;
  std::vector<PathVisit> trace_;
};

void check(const PathOptions& options) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  if (!std::isfinite(options.start_length) || options.start_length < 0.0) {
    refuse("start_length: got " + std::to_string(options.start_length) + ", wanted at least 0");
  }
  if (!std::isfinite(options.lam) || options.lam < 0.0) {
    refuse("lam: got " + std::to_string(options.lam) + ", wanted at least 0");
  }
  if (options.budget < Cost(0)) {
    refuse("budget: got " + std::to_string(options.budget.value()) + ", wanted at least 0");
  }
  if (options.reference_cost < 1) {
    refuse("reference_cost: got " + std::to_string(options.reference_cost) + ", wanted at least 1");
  }
  if (options.beam_width < 1) {
    refuse("beam_width: got " + std::to_string(options.beam_width) + ", wanted at least 1");
  }
  if (options.max_expansions < 1 || options.max_expansions >= (std::int64_t{1} << 31)) {
    refuse("max_expansions: got " + std::to_string(options.max_expansions) +
           ", wanted 1 to 2147483647");
  }
}

}  // namespace

PathResult path_search(const PathTables& tables, const PathOptions& options, const Measure& measure,
                       bool exact, const PathWatch& watch) {
  check(options);
  tables.check();
  return Search(tables, options, measure, exact, watch).run();
}

}  // namespace fitcompress
