#include "search/remaining_layers.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fitcompress {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

RemainingLayers::RemainingLayers(const std::vector<HullEdge>& edges, std::size_t split,
                                 std::int32_t layers)
    : rate_(edges[split].rate), removed_(static_cast<std::size_t>(layers), 0) {
  const auto at = edges.begin() + static_cast<std::ptrdiff_t>(split);
  up_.edges.assign(at, edges.end());
  down_.edges.assign(edges.begin(), at);
  std::reverse(down_.edges.begin(), down_.edges.end());
  for (Direction* side : {&up_, &down_}) {
    side->next.resize(side->edges.size() + 1);
    std::iota(side->next.begin(), side->next.end(), 0);
  }
}

void RemainingLayers::remove(std::int32_t layer, double room) {
  removed_[static_cast<std::size_t>(layer)] = 1;
  walk(&up_, 1.0, 0.0, room);
  walk(&down_, -1.0, kInfinity, room);
}

void RemainingLayers::walk(Direction* side, double sign, double last_rate, double room) {
  side->near.clear();
  side->cost.assign(1, 0);
  side->value.assign(1, 0.0);
  side->end_rate = last_rate;
  double over = 0.0;
  std::size_t before = 0;  // the last edge that stays, plus one
  for (std::int32_t i = side->next[0]; i < static_cast<std::int32_t>(side->edges.size());) {
    const HullEdge& edge = side->edges[static_cast<std::size_t>(i)];
    const std::int32_t after = side->next[static_cast<std::size_t>(i) + 1];
    if (removed_[static_cast<std::size_t>(edge.layer)] != 0) {
      side->next[before] = after;
    } else {
      if (over > room) {
        side->end_rate = edge.rate;
        return;
      }
      side->near.push_back(i);
      side->cost.push_back(side->cost.back() + edge.cost);
      side->value.push_back(side->value.back() + sign * edge.value);
      over += sign * (rate_ - edge.rate) * static_cast<double>(edge.cost);
      before = static_cast<std::size_t>(i) + 1;
    }
    i = after;
  }
}

Relaxation RemainingLayers::relaxed(std::int64_t room) const {
  if (room >= 0) {
    const auto after = std::upper_bound(up_.cost.begin(), up_.cost.end(), room);
    const auto whole = static_cast<std::size_t>(after - up_.cost.begin()) - 1;
    const double left = static_cast<double>(room - up_.cost[whole]);
    const double value = up_.value[whole];
    return {value - up_.rate(whole) * left, value, static_cast<std::int32_t>(whole)};
  }
  const auto reach = std::lower_bound(down_.cost.begin(), down_.cost.end(), -room);
  const auto whole = static_cast<std::size_t>(reach - down_.cost.begin());
  const double missing = static_cast<double>(-room - down_.cost[whole - 1]);
  const double value = down_.value[whole - 1] + down_.rate(whole - 1) * missing;
  if (whole == down_.cost.size()) return {value, kInfinity, 0};
  return {value, down_.value[whole], -static_cast<std::int32_t>(whole)};
}

void RemainingLayers::apply(const Relaxation& relaxation, std::vector<std::int32_t>* choice) const {
  for (std::int32_t i = 0; i < relaxation.edges; ++i) {
    const auto at = static_cast<std::size_t>(up_.near[static_cast<std::size_t>(i)]);
    (*choice)[static_cast<std::size_t>(up_.edges[at].layer)] = up_.edges[at].to;
  }
  for (std::int32_t i = 0; i < -relaxation.edges; ++i) {
    const auto at = static_cast<std::size_t>(down_.near[static_cast<std::size_t>(i)]);
    (*choice)[static_cast<std::size_t>(down_.edges[at].layer)] = down_.edges[at].from;
  }
}

}  // namespace fitcompress
