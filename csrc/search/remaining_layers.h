// The linear relaxation of the layers that are still at their break level.
#pragma once

#include <cstdint>
#include <vector>

#include "search/convex_front.h"

namespace fitcompress {

// What those layers change at best, and by whole edges, when so much room is left.
struct Relaxation {
  double value;
  double rounded;      // ∞: not known
  std::int32_t edges;  // taken whole: up if positive, else back down
};

// Edges near the break plan in both directions, as far as a change costs no more than `room` over
// the relaxation; from there on, the rate of the next one stands for all others: still a bound.
class RemainingLayers {
 public:
  RemainingLayers(const std::vector<HullEdge>& edges, std::size_t split, std::int32_t layers);

  // For layers that are removed and a room that shrinks.
  void remove(std::int32_t layer, double room);

  Relaxation relaxed(std::int64_t room) const;

  // Takes the whole edges.
  void apply(const Relaxation& relaxation, std::vector<std::int32_t>* choice) const;

 private:
  struct Direction {
    std::vector<HullEdge> edges;     // from the break plan on; all of them
    std::vector<std::int32_t> next;  // after edge i − 1; edges of removed layers are skipped
    // Of those within reach:
    std::vector<std::int32_t> near;
    std::vector<std::int64_t> cost;  // of the first i
    std::vector<double> value;
    double end_rate;  // of what lies beyond

    double rate(std::size_t i) const {
      return i < near.size() ? edges[static_cast<std::size_t>(near[i])].rate : end_rate;
    }
  };

  void walk(Direction* side, double sign, double last_rate, double room);

  double rate_;
  std::vector<char> removed_;
  Direction up_, down_;
};

}  // namespace fitcompress
