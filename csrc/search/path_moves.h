// Ways through the tables, move by move.
#pragma once

#include <cstdint>
#include <vector>

#include "search/path_tables.h"
#include "search/types.h"

namespace fitcompress {

constexpr Layer kSparsityMove(-1);

// Either a layer's grid becomes `index`, or (kSparsityMove) the sparsity.
struct Move {
  Layer layer;
  std::int32_t index;
  bool prunes() const { return layer == kSparsityMove; }
};

Levels finest(const PathTables& tables);
Levels levels_after(const PathTables& tables, const std::vector<Move>& moves);

// From the finest levels to these: grids first.
std::vector<Move> straight_to(const PathTables& tables, const Levels& levels);

// Adds the lengths of the moves to `length`.
double length_of(const PathTables& tables, const std::vector<Move>& moves, double length);

// Without the moves that the budget does not need: undoes, as long as it holds, the step that
// lowers the distortion most per cost.
std::vector<Move> filled(const PathTables& tables, std::vector<Move> moves, Cost budget);

}  // namespace fitcompress
