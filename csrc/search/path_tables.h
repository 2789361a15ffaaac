// What a path search is given: per layer, grid and sparsity the lengths, norms and costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "search/types.h"

namespace fitcompress {

// A node: one grid per layer, one sparsity for the network.
struct Levels {
  std::vector<Grid> grids;
  Sparsity sparsity;
};

// Arrays [layers, grids, sparsities], C-contiguous, owned by the caller.
struct PathTables {
  std::int32_t layers;
  std::int32_t grids;
  std::int32_t sparsities;
  const double* grid_length;   // squared length of the step to the next grid
  const double* prune_length;  // squared length of the step to the next sparsity
  const double* norm;          // Σ F θ̂²
  const double* distortion;    // ½ Σ F (θ − θ̂)²
  const std::int64_t* cost;

  std::size_t at(Layer layer, Grid grid, Sparsity sparsity) const {
    const auto row = static_cast<std::size_t>(layer.value()) * static_cast<std::size_t>(grids) +
                     static_cast<std::size_t>(grid.value());
    return row * static_cast<std::size_t>(sparsities) + static_cast<std::size_t>(sparsity.value());
  }
  std::size_t count() const { return at(last_layer(), last_grid(), last_sparsity()) + 1; }
  Cost cost_at(Layer layer, Grid grid, Sparsity sparsity) const {
    return Cost(cost[at(layer, grid, sparsity)]);
  }
  Layer last_layer() const { return Layer(layers - 1); }
  Grid last_grid() const { return Grid(grids - 1); }
  Sparsity last_sparsity() const { return Sparsity(sparsities - 1); }

  // Throws std::invalid_argument, with the numbers, on what no search can work with.
  void check() const;

  // Sums over the layers, in their order.
  double sum(const double* table, const Levels& levels) const;
  Cost total_cost(const Levels& levels) const;

  // The cheapest levels of all; of equally cheap ones, the finest.
  Levels cheapest() const;
};

}  // namespace fitcompress
