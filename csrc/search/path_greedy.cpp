#include "search/path_frontier.h"
#include "search/path_keys.h"

namespace fitcompress {
namespace {

class Greedy : public Frontier {
 public:
  void add(std::int32_t id, const Children& children) override {
    best_.f = KeyTable::kNone;
    const auto steps = static_cast<Step>(children.f.size());
    for (Step i = 0; i < steps; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const Open child{children.f[k], children.cost[k], id, i};
      if (child.f < KeyTable::kNone && (best_.f == KeyTable::kNone || child < best_)) best_ = child;
    }
  }

  bool take(Open* best) override {
    *best = best_;
    return best_.f < KeyTable::kNone;
  }

  std::size_t bytes() const override { return 0; }

 private:
  Open best_{KeyTable::kNone, Cost(), -1, -1};
};

}  // namespace

std::unique_ptr<Frontier> greedy_frontier() { return std::make_unique<Greedy>(); }

}  // namespace fitcompress
