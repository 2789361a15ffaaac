#include "search/path_tables.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace fitcompress {
namespace {

std::string place(const PathTables& tables, std::size_t i) {
  const auto s = static_cast<std::size_t>(tables.sparsities);
  const auto gs = static_cast<std::size_t>(tables.grids) * s;
  return "[" + std::to_string(i / gs) + ", " + std::to_string(i % gs / s) + ", " +
         std::to_string(i % s) + "]";
}

void check_values(const PathTables& tables, const double* values, const char* name,
                  double smallest) {
  const std::size_t count = tables.count();
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i]) || values[i] < smallest) {
      throw std::invalid_argument(std::string(name) + place(tables, i) + ": got " +
                                  std::to_string(values[i]) +
                                  (smallest == 0.0 ? ", wanted a finite number, not negative"
                                                   : ", wanted a finite number"));
    }
  }
}

}  // namespace

void PathTables::check() const {
  if (layers < 1 || grids < 1 || sparsities < 1) {
    throw std::invalid_argument("tables: got shape (" + std::to_string(layers) + ", " +
                                std::to_string(grids) + ", " + std::to_string(sparsities) +
                                "), wanted at least one layer, grid and sparsity");
  }
  // A node keeps its levels as bytes.
  if (grids > 256 || sparsities > 256) {
    throw std::invalid_argument("tables: got shape (" + std::to_string(layers) + ", " +
                                std::to_string(grids) + ", " + std::to_string(sparsities) +
                                "), wanted at most 256 grids and sparsities");
  }
  check_values(*this, grid_length, "grid_length", 0.0);
  check_values(*this, prune_length, "prune_length", 0.0);
  check_values(*this, norm, "norm", 0.0);
  check_values(*this, distortion, "distortion", std::numeric_limits<double>::lowest());
  // No sum over the layers may pass 2^62, so that differences of sums cannot overflow.
  const std::int64_t most = (std::int64_t{1} << 62) / layers;
  for (std::size_t i = 0; i < count(); ++i) {
    if (cost[i] < 0 || cost[i] > most) {
      throw std::invalid_argument("cost" + place(*this, i) + ": got " + std::to_string(cost[i]) +
                                  ", wanted 0 to " + std::to_string(most));
    }
  }
}

double PathTables::sum(const double* table, const Levels& levels) const {
  double total = 0.0;
  for (Layer l(0); l.value() < layers; l = l.next()) {
    total += table[at(l, levels.grids[static_cast<std::size_t>(l.value())], levels.sparsity)];
  }
  return total;
}

Cost PathTables::total_cost(const Levels& levels) const {
  Cost total;
  for (Layer l(0); l.value() < layers; l = l.next()) {
    total = total + cost_at(l, levels.grids[static_cast<std::size_t>(l.value())], levels.sparsity);
  }
  return total;
}

Levels PathTables::cheapest() const {
  Levels best;
  for (Sparsity s(0); s.value() < sparsities; s = s.next()) {
    Levels levels{std::vector<Grid>(static_cast<std::size_t>(layers)), s};
    for (Layer l(0); l.value() < layers; l = l.next()) {
      Grid& chosen = levels.grids[static_cast<std::size_t>(l.value())];
      for (Grid g(1); g.value() < grids; g = g.next()) {
        if (cost_at(l, g, s) < cost_at(l, chosen, s)) chosen = g;
      }
    }
    if (s == Sparsity(0) || total_cost(levels) < total_cost(best)) best = levels;
  }
  return best;
}

}  // namespace fitcompress
