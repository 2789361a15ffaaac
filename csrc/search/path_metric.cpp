#include "search/path_metric.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fitcompress {
namespace {

constexpr double kNoStep = std::numeric_limits<double>::infinity();

Steps measured(const PathCells& cells, const Measure& measure, const Node& node, Step step) {
  std::vector<std::int32_t> levels(node.levels(), node.levels() + cells.layers() + 1);
  if (step >= 0) ++levels[static_cast<std::size_t>(step)];
  const std::int32_t sparsity = levels.back();
  levels.pop_back();
  return measure(levels, sparsity);
}

double sum(const std::vector<double>& values) {
  double total = 0.0;
  for (const double value : values) total += value;
  return total;
}

}  // namespace

double PathMetric::h_of_start(const Node& start) const {
  double norm = 0.0;
  if (moves()) {
    norm = sum(measured(cells_, measure_, start, -1).norm);
  } else {
    for (std::int32_t l = 0; l < cells_.layers(); ++l) norm += cells_.at(start, l).norm;
  }
  const double away = std::abs(static_cast<double>((start.cost - heuristic_.budget).value()));
  return heuristic_.scale * (away * std::sqrt(norm));
}

void PathMetric::expand(std::int32_t id, const Node& node, Children* children) {
  const std::int32_t layers = cells_.layers();
  double* f = children->f.data();
  double* norms = children->norm.data();
  double* away = children->away.data();
  Cost* cost = children->cost.data();
  double norm = 0.0, prune = 0.0, pruned_norm = 0.0;
  Cost pruned_cost;
  for (std::int32_t l = 0; l < layers; ++l) {
    const Cell& cell = cells_.at(node, l);
    norm += cell.norm;
    prune += cell.prune;
    pruned_norm += cell.pruned_norm;
    pruned_cost = pruned_cost + Cost(cell.pruned_cost);
    f[l] = node.g + cell.step;
    norms[l] = cell.norm_change;
    cost[l] = node.cost + Cost(cell.cost_change);
    away[l] = std::abs(static_cast<double>((cost[l] - heuristic_.budget).value()));
  }
  for (std::int32_t l = 0; l < layers; ++l) {
    const double after = norm + norms[l];
    norms[l] = after > 0.0 ? after : 0.0;
  }
  const bool prunes = cells_.can_prune(node);
  f[layers] = prunes ? node.g + std::sqrt(prune) : kNoStep;
  norms[layers] = pruned_norm;
  cost[layers] = pruned_cost;
  away[layers] = std::abs(static_cast<double>((pruned_cost - heuristic_.budget).value()));
  if (moves()) measure(id, node, children);
  for (std::int32_t i = 0; i <= layers; ++i) {
    f[i] += heuristic_.scale * (away[i] * std::sqrt(norms[i]));
  }
}

// Overwrites lengths and norms of the steps that exist.
void PathMetric::measure(std::int32_t id, const Node& node, Children* children) {
  const std::int32_t layers = cells_.layers();
  const Steps steps = measured(cells_, measure_, node, -1);
  const double norm = sum(steps.norm);
  lengths_.resize((static_cast<std::size_t>(id) + 1) * (static_cast<std::size_t>(layers) + 1));
  double* lengths = lengths_.data() + lengths_.size() - static_cast<std::size_t>(layers) - 1;
  for (std::int32_t i = 0; i <= layers; ++i) {
    const auto k = static_cast<std::size_t>(i);
    if (children->f[k] == kNoStep) continue;
    if (i == cells_.pruning()) {
      lengths[i] = std::sqrt(steps.prune_length);
      children->norm[k] = steps.norm_pruned;
    } else {
      lengths[i] = std::sqrt(steps.grid_length[k]);
      children->norm[k] = std::max(norm + (steps.norm_after[k] - steps.norm[k]), 0.0);
    }
    if (exact_) children->norm[k] = sum(measured(cells_, measure_, node, i).norm);
    children->f[k] = node.g + lengths[i];
  }
}

double PathMetric::length(std::int32_t id, const Node& node, Step step) const {
  const std::int32_t layers = cells_.layers();
  if (moves()) {
    return lengths_[static_cast<std::size_t>(id) * (static_cast<std::size_t>(layers) + 1) +
                    static_cast<std::size_t>(step)];
  }
  if (step != cells_.pruning()) return cells_.at(node, step).step;
  double prune = 0.0;
  for (std::int32_t l = 0; l < layers; ++l) prune += cells_.at(node, l).prune;
  return std::sqrt(prune);
}

}  // namespace fitcompress
