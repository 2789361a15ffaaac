#include "search/path_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace fitcompress {
namespace {

constexpr Layer kSparsityMove(-1);
// The same steps in another order sum up to a length that differs by rounding: not shorter.
constexpr double kShorter = 1.0 - 1e-12;
// Children between two calls of `interrupted`: about a millisecond.
constexpr std::int64_t kInterruptEvery = 1 << 14;
// About a gigabyte of open nodes; a search that needs more ends as kLimit.
constexpr std::size_t kMostOpen = std::size_t{1} << 23;

// A level vector as 128 bits that change with each move by exclusive or (Zobrist hashing).
struct Key {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  friend bool operator==(const Key& a, const Key& b) { return a.high == b.high && a.low == b.low; }
};

struct KeyHash {
  std::size_t operator()(const Key& key) const { return static_cast<std::size_t>(key.low); }
};

std::uint64_t scramble(std::uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

Key toggled(const Key& key, Layer layer, std::int32_t index) {
  const auto cell = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(layer.value())) << 32) |
                    static_cast<std::uint32_t>(index);
  const std::uint64_t low = scramble(cell);
  return {key.high ^ scramble(low ^ 0x5851F42D4C957F2Du), key.low ^ low};
}

// Generated, not expanded.
struct Open {
  double f;
  Cost cost;
  std::int64_t order;  // of generation
  double g;
  Key key;
  std::int32_t parent;  // −1: none
  Move move;

  // A strict order: no two nodes are generated at once.
  friend bool operator<(const Open& a, const Open& b) {
    return std::tie(a.f, a.cost, a.order) < std::tie(b.f, b.cost, b.order);
  }
};

bool worse(const Open& a, const Open& b) { return b < a; }

struct Expanded {
  std::int32_t parent;
  Move move;
};

void apply(const Move& move, Levels* levels) {
  if (move.prunes()) {
    levels->sparsity = Sparsity(move.index);
  } else {
    levels->grids[static_cast<std::size_t>(move.layer.value())] = Grid(move.index);
  }
}

class Search {
 public:
  Search(const PathTables& tables, const PathOptions& options,
         const std::function<bool()>& interrupted)
      : tables_(tables), options_(options), interrupted_(interrupted) {}

  PathResult run() {
    const Levels cheapest = tables_.cheapest();
    if (options_.budget < tables_.total_cost(cheapest)) {
      return finish(straight_to(cheapest), PathStatus::kExhausted);
    }
    const Levels start = finest();
    push({heuristic(tables_.sum(tables_.norm, start), tables_.total_cost(start)),
          tables_.total_cost(start), 0, options_.start_length, Key{}, -1, Move{}});
    Cost lowest(std::numeric_limits<std::int64_t>::max());
    std::int32_t cheapest_node = 0;
    while (!open_.empty()) {
      std::pop_heap(open_.begin(), open_.end(), worse);
      const Open node = open_.back();
      open_.pop_back();
      if (!close(node)) continue;
      const auto id = static_cast<std::int32_t>(expanded_.size());
      expanded_.push_back({node.parent, node.move});
      if (node.cost <= options_.budget) return finish(filled(moves_to(id)), PathStatus::kReached);
      if (node.cost < lowest) {
        lowest = node.cost;
        cheapest_node = id;
      }
      if (expansions_ == options_.max_expansions || open_.size() > kMostOpen) {
        return finish(moves_to(cheapest_node), PathStatus::kLimit);
      }
      ++expansions_;
      if (options_.mode == PathMode::kGreedy) open_.clear();
      expand(node, id);
      if (options_.mode == PathMode::kBeam) keep_best();
    }
    return finish(moves_to(cheapest_node), PathStatus::kExhausted);
  }

 private:
  Levels finest() const {
    return {std::vector<Grid>(static_cast<std::size_t>(tables_.layers)), {}};
  }

  double heuristic(double norm, Cost cost) const {
    const double away = std::abs(static_cast<double>((cost - options_.budget).value()));
    return options_.lam * (away / static_cast<double>(options_.reference_cost) * std::sqrt(norm));
  }

  void push(const Open& node) {
    open_.push_back(node);
    std::push_heap(open_.begin(), open_.end(), worse);
  }

  // False where a way to the same levels has been expanded already.
  bool close(const Open& node) {
    if (options_.mode == PathMode::kGreedy) return true;  // one way: nothing comes twice
    return std::exchange(shortest_[node.key], -1.0) >= 0.0;
  }

  // Is this way to these levels shorter than every one before? Expanded levels keep theirs.
  bool improves(const Key& key, double g) {
    if (options_.mode == PathMode::kGreedy) return true;
    const auto [entry, is_new] = shortest_.try_emplace(key, g);
    if (is_new) return true;
    if (!(g < entry->second * kShorter)) return false;
    entry->second = g;
    return true;
  }

  std::vector<Move> moves_to(std::int32_t id) const {
    std::vector<Move> moves;
    for (; expanded_[static_cast<std::size_t>(id)].parent >= 0;
         id = expanded_[static_cast<std::size_t>(id)].parent) {
      moves.push_back(expanded_[static_cast<std::size_t>(id)].move);
    }
    std::reverse(moves.begin(), moves.end());
    return moves;
  }

  Levels levels_after(const std::vector<Move>& moves) const {
    Levels levels = finest();
    for (const Move& move : moves) apply(move, &levels);
    return levels;
  }

  void expand(const Open& node, std::int32_t id) {
    const Levels levels = levels_after(moves_to(id));
    const double norm = tables_.sum(tables_.norm, levels);
    const Sparsity s = levels.sparsity;
    for (Layer l(0); l.value() < tables_.layers; l = l.next()) {
      const Grid from = levels.grids[static_cast<std::size_t>(l.value())];
      if (from == tables_.last_grid()) continue;
      const Grid to = from.next();
      const std::size_t old_cell = tables_.at(l, from, s), new_cell = tables_.at(l, to, s);
      const double g = node.g + std::sqrt(tables_.grid_length[old_cell]);
      const Cost cost = node.cost - tables_.cost_at(l, from, s) + tables_.cost_at(l, to, s);
      const double norm_after = norm - tables_.norm[old_cell] + tables_.norm[new_cell];
      add(node, id, {l, to.value()}, from.value(), g, cost, std::max(norm_after, 0.0));
    }
    if (s == tables_.last_sparsity()) return;
    Levels after = levels;
    after.sparsity = s.next();
    const double g = node.g + std::sqrt(tables_.sum(tables_.prune_length, levels));
    add(node, id, {kSparsityMove, after.sparsity.value()}, s.value(), g, tables_.total_cost(after),
        tables_.sum(tables_.norm, after));
  }

  void add(const Open& node, std::int32_t id, Move move, std::int32_t from, double g, Cost cost,
           double norm) {
    if (++generated_ % kInterruptEvery == 0 && interrupted_()) throw PathInterrupted{};
    const Key key = toggled(toggled(node.key, move.layer, from), move.layer, move.index);
    if (!improves(key, g)) return;
    push({g + heuristic(norm, cost), cost, generated_, g, key, id, move});
  }

  void keep_best() {
    if (static_cast<std::int64_t>(open_.size()) <= options_.beam_width) return;
    const auto end = open_.begin() + options_.beam_width;
    std::nth_element(open_.begin(), end, open_.end());
    for (auto node = end; node != open_.end(); ++node) {
      // A dropped node may come back by another way, unless it is one that was overtaken.
      const auto entry = shortest_.find(node->key);
      if (entry != shortest_.end() && entry->second == node->g) shortest_.erase(entry);
    }
    open_.erase(end, open_.end());
    std::make_heap(open_.begin(), open_.end(), worse);
  }

  std::vector<Move> straight_to(const Levels& levels) const {
    std::vector<Move> moves;
    for (Layer l(0); l.value() < tables_.layers; l = l.next()) {
      const Grid last = levels.grids[static_cast<std::size_t>(l.value())];
      for (Grid g(0); g < last; g = g.next()) moves.push_back({l, g.next().value()});
    }
    for (Sparsity s(0); s < levels.sparsity; s = s.next()) {
      moves.push_back({kSparsityMove, s.next().value()});
    }
    return moves;
  }

  // Undoes the step that lowers the distortion most per cost, while the budget holds.
  std::vector<Move> filled(std::vector<Move> moves) const {
    Levels levels = levels_after(moves);
    for (;;) {
      const Move undo = best_undo(levels);
      if (undo.index < 0) return moves;
      apply(undo, &levels);
      const auto last = std::find_if(moves.rbegin(), moves.rend(),
                                     [&](const Move& m) { return m.layer == undo.layer; });
      moves.erase(std::next(last).base());
    }
  }

  // The move back to the level before, or index −1: nothing fits.
  Move best_undo(const Levels& levels) const {
    const Cost room = options_.budget - tables_.total_cost(levels);
    const Sparsity s = levels.sparsity;
    Move best{kSparsityMove, -1};
    double best_rate = 0.0;
    const auto consider = [&](Move move, double gain, Cost price) {
      if (!(gain > 0.0) || room < price) return;
      const double rate = price <= Cost(0) ? std::numeric_limits<double>::infinity()
                                           : gain / static_cast<double>(price.value());
      if (rate > best_rate) {
        best_rate = rate;
        best = move;
      }
    };
    for (Layer l(0); l.value() < tables_.layers; l = l.next()) {
      const Grid from = levels.grids[static_cast<std::size_t>(l.value())];
      if (from == Grid(0)) continue;
      const Grid to = from.previous();
      consider(
          {l, to.value()},
          tables_.distortion[tables_.at(l, from, s)] - tables_.distortion[tables_.at(l, to, s)],
          tables_.cost_at(l, to, s) - tables_.cost_at(l, from, s));
    }
    if (s != Sparsity(0)) {
      Levels after = levels;
      after.sparsity = s.previous();
      consider({kSparsityMove, after.sparsity.value()},
               tables_.sum(tables_.distortion, levels) - tables_.sum(tables_.distortion, after),
               tables_.total_cost(after) - tables_.total_cost(levels));
    }
    return best;
  }

  PathResult finish(std::vector<Move> moves, PathStatus status) const {
    Levels levels = finest();
    double length = options_.start_length;
    for (const Move& move : moves) {
      if (move.prunes()) {
        length += std::sqrt(tables_.sum(tables_.prune_length, levels));
      } else {
        const Grid from = levels.grids[static_cast<std::size_t>(move.layer.value())];
        length += std::sqrt(tables_.grid_length[tables_.at(move.layer, from, levels.sparsity)]);
      }
      apply(move, &levels);
    }
    const double distortion = tables_.sum(tables_.distortion, levels);
    const Cost cost = tables_.total_cost(levels);
    return {std::move(levels), length, distortion, cost, expansions_, status, std::move(moves)};
  }

  const PathTables& tables_;
  const PathOptions& options_;
  const std::function<bool()>& interrupted_;
  std::vector<Open> open_;  // a heap, the best on top
  std::vector<Expanded> expanded_;
  std::unordered_map<Key, double, KeyHash> shortest_;  // length found so far; −1: expanded
  std::int64_t generated_ = 0;
  std::int64_t expansions_ = 0;
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

PathResult path_search(const PathTables& tables, const PathOptions& options,
                       const std::function<bool()>& interrupted) {
  check(options);
  tables.check();
  return Search(tables, options, interrupted).run();
}

}  // namespace fitcompress
