#include "search/convex_front.h"

#include <algorithm>
#include <tuple>

namespace fitcompress {
namespace {

// The corners of a layer, by rising cost, in `corners`.
void lower_hull(const LevelLists& levels, std::int32_t layer, std::vector<std::int32_t>* corners) {
  const auto value = [&](std::int32_t k) { return levels.value[static_cast<std::size_t>(k)]; };
  const auto cost = [&](std::int32_t k) { return levels.cost[0][static_cast<std::size_t>(k)]; };
  corners->clear();
  const auto l = static_cast<std::size_t>(layer);
  for (std::int32_t k = levels.begin[l]; k < levels.begin[l + 1]; ++k) {
    while (corners->size() >= 2) {
      const std::int32_t a = (*corners)[corners->size() - 2], b = corners->back();
      const double left = (value(b) - value(a)) * static_cast<double>(cost(k) - cost(a));
      const double right = (value(k) - value(a)) * static_cast<double>(cost(b) - cost(a));
      if (left < right) break;
      corners->pop_back();
    }
    corners->push_back(k);
  }
}

}  // namespace

std::vector<HullEdge> convex_front(const LevelLists& levels) {
  std::vector<HullEdge> edges;
  std::vector<std::int32_t> corners;
  for (std::int32_t l = 0; l < levels.layers(); ++l) {
    lower_hull(levels, l, &corners);
    for (std::size_t i = 1; i < corners.size(); ++i) {
      const auto from = static_cast<std::size_t>(corners[i - 1]);
      const auto to = static_cast<std::size_t>(corners[i]);
      const std::int64_t cost = levels.cost[0][to] - levels.cost[0][from];
      const double value = levels.value[to] - levels.value[from];
      edges.push_back(
          {-value / static_cast<double>(cost), l, corners[i - 1], corners[i], cost, value});
      // Rounding must not break the order within a layer.
      if (i > 1) edges.back().rate = std::min(edges.back().rate, edges[edges.size() - 2].rate);
    }
  }
  std::sort(edges.begin(), edges.end(), [](const HullEdge& a, const HullEdge& b) {
    return std::tie(b.rate, a.layer, a.from) < std::tie(a.rate, b.layer, b.from);
  });
  return edges;
}

std::vector<HullEdge> convex_front(const KnapsackTables& tables, std::vector<std::int32_t>* start) {
  const ReducedKnapsack problem = undominated_levels(tables);
  start->assign(problem.layer.size(), 0);
  for (std::size_t l = 0; l < problem.layer.size(); ++l) {
    const auto first = static_cast<std::size_t>(problem.levels.begin[l]);
    (*start)[static_cast<std::size_t>(problem.layer[l])] = problem.levels.origin[first];
  }
  std::vector<HullEdge> edges = convex_front(problem.levels);
  for (HullEdge& edge : edges) {
    edge.layer = problem.layer[static_cast<std::size_t>(edge.layer)];
    edge.from = problem.levels.origin[static_cast<std::size_t>(edge.from)];
    edge.to = problem.levels.origin[static_cast<std::size_t>(edge.to)];
  }
  return edges;
}

}  // namespace fitcompress
