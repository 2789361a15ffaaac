// The linear relaxation of the layers that are still at their break level.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "search/convex_front.h"

namespace fitcompress {

// What those layers change at best, and by whole edges, when so much room is left.
struct Relaxation {
  double value;
  double rounded;      // ∞: not known
  std::int32_t edges;  // taken whole: up if positive, else back down
};

// Edges near the break plan in both directions. Beyond them, where a change already costs more than
// `room` over the relaxation, the last rate stands for all others: still a bound.
class RemainingLayers {
 public:
  RemainingLayers(const std::vector<HullEdge>& edges, std::size_t split, double room)
      : rate_(edges[split].rate) {
    for (std::size_t i = split; i < edges.size(); ++i) up_.edges.push_back(edges[i]);
    for (std::size_t i = split; i > 0; --i) down_.edges.push_back(edges[i - 1]);
    up_.end_rate = 0.0;
    down_.end_rate = std::numeric_limits<double>::infinity();
    trim(room);
  }

  void remove(std::int32_t layer, double room) {
    for (Direction* side : {&up_, &down_}) {
      const auto of_layer = [&](const HullEdge& edge) { return edge.layer == layer; };
      side->edges.erase(std::remove_if(side->edges.begin(), side->edges.end(), of_layer),
                        side->edges.end());
    }
    trim(room);
  }

  Relaxation relaxed(std::int64_t room) const {
    if (room >= 0) {
      const auto after = std::upper_bound(up_.cost.begin(), up_.cost.end(), room);
      const auto whole = static_cast<std::size_t>(after - up_.cost.begin()) - 1;
      const double rate = whole < up_.edges.size() ? up_.edges[whole].rate : up_.end_rate;
      const double value = up_.value[whole];
      return {value - rate * static_cast<double>(room - up_.cost[whole]), value,
              static_cast<std::int32_t>(whole)};
    }
    const auto reach = std::lower_bound(down_.cost.begin(), down_.cost.end(), -room);
    const auto whole = static_cast<std::size_t>(reach - down_.cost.begin());
    const std::size_t last = whole - 1;
    const double missing = static_cast<double>(-room - down_.cost[last]);
    if (whole < down_.cost.size()) {
      return {down_.value[last] + down_.edges[last].rate * missing, down_.value[whole],
              -static_cast<std::int32_t>(whole)};
    }
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    return {down_.value[last] + down_.end_rate * missing, kInfinity, 0};
  }

  // Takes the whole edges.
  void apply(const Relaxation& relaxation, std::vector<std::int32_t>* choice) const {
    for (std::int32_t i = 0; i < relaxation.edges; ++i) {
      const HullEdge& edge = up_.edges[static_cast<std::size_t>(i)];
      (*choice)[static_cast<std::size_t>(edge.layer)] = edge.to;
    }
    for (std::int32_t i = 0; i < -relaxation.edges; ++i) {
      const HullEdge& edge = down_.edges[static_cast<std::size_t>(i)];
      (*choice)[static_cast<std::size_t>(edge.layer)] = edge.from;
    }
  }

 private:
  struct Direction {
    std::vector<HullEdge> edges;
    double end_rate;                 // of what lies beyond
    std::vector<std::int64_t> cost;  // of the first i edges
    std::vector<double> value;
  };

  void trim(double room) {
    for (Direction* side : {&up_, &down_}) {
      const double sign = side == &up_ ? 1.0 : -1.0;
      side->cost.assign(1, 0);
      side->value.assign(1, 0.0);
      double over = 0.0;
      for (std::size_t i = 0; i < side->edges.size(); ++i) {
        const HullEdge& edge = side->edges[i];
        if (over > room) {
          side->end_rate = edge.rate;
          side->edges.erase(side->edges.begin() + static_cast<std::ptrdiff_t>(i),
                            side->edges.end());
          break;
        }
        side->cost.push_back(side->cost.back() + edge.cost);
        side->value.push_back(side->value.back() + sign * edge.value);
        over += sign * (rate_ - edge.rate) * static_cast<double>(edge.cost);
      }
    }
  }

  double rate_;
  Direction up_, down_;
};

}  // namespace fitcompress
