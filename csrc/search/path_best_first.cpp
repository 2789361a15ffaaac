// All children of all expanded nodes are open, yet the heap holds one of each node: its best. When
// that is taken, the next one takes its place (partial expansion, Yoshizumi et al. 2000).
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "search/path_frontier.h"
#include "search/path_keys.h"

namespace fitcompress {
namespace {

constexpr double kGone = std::numeric_limits<double>::infinity();

// f of the children of every node, in blocks that do not move.
class Values {
 public:
  explicit Values(std::size_t row) : row_(row) {}

  double* at(std::int32_t id) {
    const auto i = static_cast<std::size_t>(id);
    return blocks_[i / kBlock].data() + i % kBlock * row_;
  }
  void add(std::int32_t id, const std::vector<double>& values) {
    if (static_cast<std::size_t>(id) % kBlock == 0) blocks_.emplace_back(kBlock * row_);
    std::copy(values.begin(), values.end(), at(id));
  }
  std::size_t bytes() const { return blocks_.size() * kBlock * row_ * sizeof(double); }

 private:
  static constexpr std::size_t kBlock = 1024;
  std::size_t row_;
  std::vector<std::vector<double>> blocks_;
};

double least(const double* values, std::size_t count) {
  double least[4] = {kGone, kGone, kGone, kGone};
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (std::size_t k = 0; k < 4; ++k) least[k] = std::min(least[k], values[i + k]);
  }
  for (; i < count; ++i) least[0] = std::min(least[0], values[i]);
  return std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
}

class BestFirst : public Frontier {
 public:
  BestFirst(const NodeStore& nodes, const PathCells& cells)
      : nodes_(nodes), cells_(cells), values_(static_cast<std::size_t>(cells.layers()) + 1) {
    taken_.at(0) = 0.0;  // the start
  }

  void add(std::int32_t id, const Children& children) override {
    values_.add(id, children.f);
    Open child;
    if (!next(id, &child)) return;
    heap_.push_back(child);
    rise(heap_.size() - 1);
  }

  bool take(Open* best) override {
    while (!heap_.empty()) {
      *best = heap_.front();
      const bool is_new = std::exchange(taken_.at(nodes_.key_after(best->parent, best->step)),
                                        0.0) == KeyTable::kNone;
      if (!next(best->parent, &heap_.front())) {
        heap_.front() = heap_.back();
        heap_.pop_back();
      }
      sink();
      if (is_new) return true;
    }
    return false;
  }

  std::size_t bytes() const override {
    return values_.bytes() + taken_.bytes() + heap_.capacity() * sizeof(Open);
  }

 private:
  // The best child of a node that is still open and was not taken by another way.
  bool next(std::int32_t id, Open* child) {
    double* values = values_.at(id);
    const Node& node = nodes_[id];
    const Step steps = cells_.pruning() + 1;
    for (;;) {
      const double f = least(values, static_cast<std::size_t>(steps));
      if (f == kGone) return false;
      Open best{f, Cost(), id, -1};
      for (Step i = 0; i < steps; ++i) {
        if (values[i] != f) continue;
        const Cost cost = cells_.cost_after(node, i);
        if (best.step < 0 || cost < best.cost) best = {f, cost, id, i};
      }
      values[best.step] = kGone;
      if (taken_.find(nodes_.key_after(id, best.step)) < KeyTable::kNone) continue;
      *child = best;
      return true;
    }
  }

  static constexpr std::size_t kArity = 4;

  void rise(std::size_t i) {
    const Open moved = heap_[i];
    for (; i > 0 && moved < heap_[(i - 1) / kArity]; i = (i - 1) / kArity) {
      heap_[i] = heap_[(i - 1) / kArity];
    }
    heap_[i] = moved;
  }

  // The front may be too large for its place.
  void sink() {
    if (heap_.empty()) return;
    const Open moved = heap_.front();
    std::size_t i = 0;
    for (;;) {
      const std::size_t child = kArity * i + 1;
      if (child >= heap_.size()) break;
      std::size_t best = child;
      for (std::size_t k = child + 1; k < std::min(child + kArity, heap_.size()); ++k) {
        if (heap_[k] < heap_[best]) best = k;
      }
      if (!(heap_[best] < moved)) break;
      heap_[i] = heap_[best];
      i = best;
    }
    heap_[i] = moved;
  }

  const NodeStore& nodes_;
  const PathCells& cells_;
  Values values_;
  std::vector<Open> heap_;
  KeyTable taken_;
};

}  // namespace

std::unique_ptr<Frontier> full_frontier(const NodeStore& nodes, const PathCells& cells) {
  return std::make_unique<BestFirst>(nodes, cells);
}

}  // namespace fitcompress
