#include "search/path_moves.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fitcompress {
namespace {

std::size_t index_of(Layer layer) { return static_cast<std::size_t>(layer.value()); }

void apply(const Move& move, Levels* levels) {
  if (move.prunes()) {
    levels->sparsity = Sparsity(move.index);
  } else {
    levels->grids[index_of(move.layer)] = Grid(move.index);
  }
}

// The move back to the level before, or index −1: nothing fits.
Move best_undo(const PathTables& tables, const Levels& levels, Cost budget) {
  const Cost room = budget - tables.total_cost(levels);
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
  for (Layer l(0); l.value() < tables.layers; l = l.next()) {
    const Grid from = levels.grids[index_of(l)];
    if (from == Grid(0)) continue;
    const Grid to = from.previous();
    consider({l, to.value()},
             tables.distortion[tables.at(l, from, s)] - tables.distortion[tables.at(l, to, s)],
             tables.cost_at(l, to, s) - tables.cost_at(l, from, s));
  }
  if (s != Sparsity(0)) {
    Levels after = levels;
    after.sparsity = s.previous();
    consider({kSparsityMove, after.sparsity.value()},
             tables.sum(tables.distortion, levels) - tables.sum(tables.distortion, after),
             tables.total_cost(after) - tables.total_cost(levels));
  }
  return best;
}

}  // namespace

Levels finest(const PathTables& tables) {
  return {std::vector<Grid>(static_cast<std::size_t>(tables.layers)), {}};
}

Levels levels_after(const PathTables& tables, const std::vector<Move>& moves) {
  Levels levels = finest(tables);
  for (const Move& move : moves) apply(move, &levels);
  return levels;
}

std::vector<Move> straight_to(const PathTables& tables, const Levels& levels) {
  std::vector<Move> moves;
  for (Layer l(0); l.value() < tables.layers; l = l.next()) {
    const Grid last = levels.grids[index_of(l)];
    for (Grid g(0); g < last; g = g.next()) moves.push_back({l, g.next().value()});
  }
  for (Sparsity s(0); s < levels.sparsity; s = s.next()) {
    moves.push_back({kSparsityMove, s.next().value()});
  }
  return moves;
}

double length_of(const PathTables& tables, const std::vector<Move>& moves, double length) {
  Levels levels = finest(tables);
  for (const Move& move : moves) {
    if (move.prunes()) {
      length += std::sqrt(tables.sum(tables.prune_length, levels));
    } else {
      const Grid from = levels.grids[index_of(move.layer)];
      length += std::sqrt(tables.grid_length[tables.at(move.layer, from, levels.sparsity)]);
    }
    apply(move, &levels);
  }
  return length;
}

std::vector<Move> filled(const PathTables& tables, std::vector<Move> moves, Cost budget) {
  Levels levels = levels_after(tables, moves);
  for (;;) {
    const Move undo = best_undo(tables, levels, budget);
    if (undo.index < 0) return moves;
    apply(undo, &levels);
    const auto last = std::find_if(moves.rbegin(), moves.rend(),
                                   [&](const Move& m) { return m.layer == undo.layer; });
    moves.erase(std::next(last).base());
  }
}

}  // namespace fitcompress
