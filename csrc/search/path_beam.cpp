// A sorted array with room at both ends: the best leaves at the front, the worst at the back, and
// an insertion moves the shorter side.
#include <algorithm>
#include <limits>
#include <vector>

#include "search/path_frontier.h"
#include "search/path_keys.h"

namespace fitcompress {
namespace {

constexpr double kTaken = -std::numeric_limits<double>::infinity();

struct Entry {
  Open open;
  Key key;
};

bool before(const Entry& a, const Entry& b) { return a.open < b.open; }

class Beam : public Frontier {
 public:
  Beam(const NodeStore& nodes, std::int64_t width)
      : nodes_(nodes), width_(static_cast<std::size_t>(width)), entries_(kRoom) {}

  void add(std::int32_t id, const Children& children) override {
    const auto steps = static_cast<Step>(children.f.size());
    for (Step i = 0; i < steps; ++i) {
      const auto k = static_cast<std::size_t>(i);
      if (!(children.f[k] < KeyTable::kNone)) continue;
      const Open child{children.f[k], children.cost[k], id, i};
      if (last_ - first_ == width_ && !(child < entries_[last_ - 1].open)) continue;
      offer({child, nodes_.key_after(id, i)});
    }
  }

  bool take(Open* best) override {
    if (first_ == last_) return false;
    const Entry& entry = entries_[first_++];
    known_.at(entry.key) = kTaken;
    *best = entry.open;
    return true;
  }

  std::size_t bytes() const override { return entries_.size() * sizeof(Entry) + known_.bytes(); }

 private:
  static constexpr std::size_t kRoom = 256;

  void offer(const Entry& entry) {
    double& f = known_.at(entry.key);  // of the open node with these levels
    if (f <= entry.open.f) return;     // a better one is open, or was taken
    const double worse = f;
    f = entry.open.f;
    if (worse < KeyTable::kNone) remove(worse, entry.key);
    insert(entry);
    if (last_ - first_ > width_) known_.at(entries_[--last_].key) = KeyTable::kNone;
  }

  std::vector<Entry>::iterator at(std::size_t i) {
    return entries_.begin() + static_cast<std::ptrdiff_t>(i);
  }

  void insert(const Entry& entry) {
    if (first_ == 0 || last_ == entries_.size()) make_room();
    const auto place = std::upper_bound(at(first_), at(last_), entry, before);
    if (place - at(first_) < at(last_) - place) {
      std::move(at(first_), place, at(first_ - 1));
      --first_;
      *(place - 1) = entry;
    } else {
      std::move_backward(place, at(last_), at(last_ + 1));
      ++last_;
      *place = entry;
    }
  }

  void remove(double f, Key key) {
    auto found = std::lower_bound(at(first_), at(last_), f,
                                  [](const Entry& e, double value) { return e.open.f < value; });
    while (found->key != key) ++found;
    std::move(found + 1, at(last_), found);
    --last_;
  }

  // Moves the entries to the middle of an array four times as long as they are.
  void make_room() {
    const std::size_t count = last_ - first_;
    std::vector<Entry> wider(std::max(kRoom, 4 * count));
    const std::size_t start = (wider.size() - count) / 2;
    std::copy(at(first_), at(last_), wider.begin() + static_cast<std::ptrdiff_t>(start));
    entries_.swap(wider);
    first_ = start;
    last_ = start + count;
  }

  const NodeStore& nodes_;
  std::size_t width_;
  std::vector<Entry> entries_;
  std::size_t first_ = kRoom / 2, last_ = kRoom / 2;
  KeyTable known_;
};

}  // namespace

std::unique_ptr<Frontier> beam_frontier(const NodeStore& nodes, std::int64_t width) {
  return std::make_unique<Beam>(nodes, width);
}

}  // namespace fitcompress
