// The nodes that a search has taken up: levels as bytes, and how each was reached.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "search/types.h"

namespace fitcompress {

// A step from a node: the layer whose grid becomes coarser, or `layers` for the sparsity.
using Step = std::int32_t;

// Stands for a level vector: exclusive or of one hash per layer (Zobrist hashing), so a step
// changes two of them. Two of ten million vectors share a key with a probability of 3e-6.
using Key = std::uint64_t;

inline Key key_of(Step step, std::int32_t level) {  // splitmix64
  Key x = (static_cast<Key>(static_cast<std::uint32_t>(step)) << 32) |
          static_cast<Key>(static_cast<std::uint32_t>(level));
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Node {
  double g;
  Cost cost;
  Key key;
  std::int32_t parent;  // −1: none
  Step step;            // from the parent

  // Grids of the layers, then the sparsity: they lie behind the node.
  const std::uint8_t* levels() const { return reinterpret_cast<const std::uint8_t*>(this + 1); }
  std::uint8_t* levels() { return reinterpret_cast<std::uint8_t*>(this + 1); }
};

// Append-only and never moved: blocks of records of equal size.
class NodeStore {
 public:
  explicit NodeStore(std::int32_t layers)
      : layers_(layers),
        lines_((sizeof(Node) + static_cast<std::size_t>(layers) + sizeof(Line)) / sizeof(Line)) {}

  std::int32_t size() const { return size_; }
  std::size_t bytes() const { return blocks_.size() * kBlock * lines_ * sizeof(Line); }

  const Node& operator[](std::int32_t id) const {
    const auto i = static_cast<std::size_t>(id);
    const Line* line = blocks_[i / kBlock].data() + i % kBlock * lines_;
    return *reinterpret_cast<const Node*>(line->bytes);
  }

  // All levels 0, no parent.
  std::int32_t add_start(double g, Cost cost) {
    Node& node = grow();
    node.g = g;
    node.cost = cost;
    node.key = 0;
    node.parent = -1;
    node.step = -1;
    return size_ - 1;
  }

  std::int32_t add(std::int32_t parent, Step step, double g, Cost cost) {
    Node& node = grow();
    const Node& from = (*this)[parent];
    for (std::int32_t i = 0; i <= layers_; ++i) node.levels()[i] = from.levels()[i];
    ++node.levels()[step];
    node.g = g;
    node.cost = cost;
    node.key = key_after(parent, step);
    node.parent = parent;
    node.step = step;
    return size_ - 1;
  }

  Key key_after(std::int32_t parent, Step step) const {
    const Node& from = (*this)[parent];
    const std::int32_t level = from.levels()[step];
    return from.key ^ key_of(step, level) ^ key_of(step, level + 1);
  }

 private:
  static constexpr std::size_t kBlock = 1024;  // records
  struct alignas(64) Line {
    unsigned char bytes[64];
  };

  Node& grow() {
    const auto i = static_cast<std::size_t>(size_++);
    if (i % kBlock == 0) blocks_.emplace_back(kBlock * lines_);
    return *reinterpret_cast<Node*>((blocks_.back().data() + i % kBlock * lines_)->bytes);
  }

  std::int32_t layers_;
  std::size_t lines_;  // of a record
  std::vector<std::vector<Line>> blocks_;
  std::int32_t size_ = 0;
};

}  // namespace fitcompress
