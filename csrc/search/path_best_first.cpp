// All children of all expanded nodes are open, yet the heap holds one of each node: its best. When
// that is taken, the next one takes its place (partial expansion, Yoshizumi et al. 2000).
//
// Two layers' grids can be lowered in either order. Of two children of a node the better one is
// expanded first, and opens what both steps lead to; when the other one is expanded, it need not.
// That is most of the ways to levels that are known already, found without a look into a table.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "search/path_frontier.h"
#include "search/path_huge_pages.h"
#include "search/path_keys.h"

namespace fitcompress {
namespace {

// Among the f of children: no step, or in the heap.
constexpr double kGone = std::numeric_limits<double>::infinity();
// Likewise: its levels are expanded, and this way to them is no better.
constexpr double kSpent = std::numeric_limits<double>::max();

// Among the known ways to levels: f as it is while they are open, −f once they are expanded.
bool is_taken(double known) { return std::signbit(known); }

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
  void prefetch(std::int32_t id) {
    const double* row = at(id);
    for (std::size_t i = 0; i < row_; i += 8) __builtin_prefetch(row + i);
  }
  std::size_t bytes() const { return blocks_.size() * kBlock * row_ * sizeof(double); }

 private:
  static constexpr std::size_t kBlock = 1 << 12;
  using Block = std::vector<double, HugePages<double>>;
  std::size_t row_;
  std::vector<Block> blocks_;
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

// On the heap: a child of `open.parent`, and the key of its levels.
struct Entry {
  Open open;
  Key key;
};

class BestFirst : public Frontier {
 public:
  BestFirst(const NodeStore& nodes, const PathCells& cells, bool commutes)
      : nodes_(nodes),
        cells_(cells),
        commutes_(commutes),
        values_(static_cast<std::size_t>(cells.layers()) + 1) {
    known_.at(0) = -0.0;  // the start
  }

  void add(std::int32_t id, const Children& children) override {
    values_.add(id, children.f);
    Entry child;
    if (heap_.empty()) {  // the node is the start
      if (next(id, best_of(id), &child)) heap_.push_back(child);
      return;
    }
    const Open self = heap_.front().open;
    if (commutes_) leave_to_siblings(id, self);
    const Entry first = best_of(id), second = best_of(self.parent);
    known_.prefetch(first.key);
    known_.prefetch(second.key);
    advance(second);
    if (next(id, first, &child)) {
      heap_.push_back(child);
      rise(heap_.size() - 1);
    }
    for (std::size_t i = 0; i < std::min(heap_.size(), kArity + 1); ++i) {  // soon to be taken
      known_.prefetch(heap_[i].key);
      values_.prefetch(heap_[i].open.parent);
    }
  }

  // What is taken stays on the heap until its children are added, as its siblings are needed then.
  bool take(Open* best) override {
    while (!heap_.empty()) {
      *best = heap_.front().open;
      values_.at(best->parent)[best->step] = kSpent;
      double& known = known_.at(heap_.front().key);
      if (!is_taken(known) && known == best->f) {
        known = -best->f;
        return true;
      }
      advance(best_of(best->parent));  // a better way was taken
    }
    return false;
  }

  std::size_t bytes() const override {
    return values_.bytes() + known_.bytes() + heap_.capacity() * sizeof(Entry);
  }

 private:
  // The best child of a node that is left; its f is kSpent or more if none is.
  Entry best_of(std::int32_t id) {
    const double* values = values_.at(id);
    const Node& node = nodes_[id];
    const Step steps = cells_.pruning() + 1;
    Open best{least(values, static_cast<std::size_t>(steps)), Cost(), id, -1};
    if (best.f >= kSpent) return {best, 0};
    for (Step i = 0; i < steps; ++i) {
      if (values[i] != best.f) continue;
      const Cost cost = cells_.cost_after(node, i);
      if (best.step < 0 || cost < best.cost) best = {best.f, cost, id, i};
    }
    return {best, nodes_.key_after(id, best.step)};
  }

  // From `best` on, the first child of a node that no better way is known to.
  bool next(std::int32_t id, Entry best, Entry* child) {
    for (; best.open.f < kSpent; best = best_of(id)) {
      double& value = values_.at(id)[best.open.step];
      double& known = known_.at(best.key);
      if (!is_taken(known) && known >= best.open.f) {  // of equal ways the older one is taken
        value = kGone;
        known = best.open.f;
        *child = best;
        return true;
      }
      value = is_taken(known) && -known > best.open.f ? kGone : kSpent;
    }
    return false;
  }

  // Closes the children that better siblings of a node have opened.
  void leave_to_siblings(std::int32_t id, const Open& self) {
    if (self.step == cells_.pruning()) return;
    const double* siblings = values_.at(self.parent);
    double* values = values_.at(id);
    for (Step i = 0; i < cells_.layers(); ++i) {
      if (siblings[i] == kSpent && i != self.step) values[i] = kGone;
    }
  }

  // Replaces the front of the heap by its next sibling, the best of those left.
  void advance(const Entry& sibling) {
    if (!next(heap_.front().open.parent, sibling, &heap_.front())) {
      heap_.front() = heap_.back();
      heap_.pop_back();
    }
    sink();
  }

  static constexpr std::size_t kArity = 4;

  void rise(std::size_t i) {
    const Entry moved = heap_[i];
    for (; i > 0 && moved.open < heap_[(i - 1) / kArity].open; i = (i - 1) / kArity) {
      heap_[i] = heap_[(i - 1) / kArity];
    }
    heap_[i] = moved;
  }

  // The front may be too large for its place.
  void sink() {
    if (heap_.empty()) return;
    const Entry moved = heap_.front();
    std::size_t i = 0;
    for (;;) {
      const std::size_t child = kArity * i + 1;
      if (child >= heap_.size()) break;
      std::size_t best = child;
      for (std::size_t k = child + 1; k < std::min(child + kArity, heap_.size()); ++k) {
        if (heap_[k].open < heap_[best].open) best = k;
      }
      if (!(heap_[best].open < moved.open)) break;
      heap_[i] = heap_[best];
      i = best;
    }
    heap_[i] = moved;
  }

  const NodeStore& nodes_;
  const PathCells& cells_;
  bool commutes_;
  Values values_;
  std::vector<Entry, HugePages<Entry>> heap_;
  KeyTable known_;
};

}  // namespace

std::unique_ptr<Frontier> full_frontier(const NodeStore& nodes, const PathCells& cells,
                                        bool commutes) {
  return std::make_unique<BestFirst>(nodes, cells, commutes);
}

}  // namespace fitcompress
