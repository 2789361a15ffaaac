// A hash table from keys to numbers, open addressing with linear probing.
#pragma once

#include <cstddef>
#include <limits>
#include <vector>

#include "search/path_huge_pages.h"
#include "search/path_nodes.h"

namespace fitcompress {

class KeyTable {
 public:
  // What a key that was never seen, or was forgotten, has.
  static constexpr double kNone = std::numeric_limits<double>::infinity();

  KeyTable() : slots_(std::size_t{1} << 10) {}

  std::size_t bytes() const { return slots_.size() * sizeof(Slot); }

  void prefetch(Key key) const {
    __builtin_prefetch(&slots_[static_cast<std::size_t>(key) & (slots_.size() - 1)]);
  }

  // Valid until the next call.
  double& at(Key key) {
    if (2 * used_ >= slots_.size()) rebuild();
    Slot& slot = slots_[place(key)];
    if (!slot.used()) {
      slot = {key, kNone};
      ++used_;
    }
    return slot.value;
  }

 private:
  struct Slot {
    Key key = 0;
    double value = std::numeric_limits<double>::quiet_NaN();  // unused
    bool used() const { return value == value; }
  };

  using Slots = std::vector<Slot, HugePages<Slot>>;

  // Where the key is, or would be.
  std::size_t place(Key key) const {
    const std::size_t last = slots_.size() - 1;
    std::size_t i = static_cast<std::size_t>(key) & last;
    while (slots_[i].used() && slots_[i].key != key) i = (i + 1) & last;
    return i;
  }

  // Twice the size, unless half of the keys are forgotten ones, which go.
  void rebuild() {
    std::size_t kept = 0;
    for (const Slot& slot : slots_) kept += slot.used() && slot.value < kNone;
    Slots old(4 * kept > slots_.size() ? 2 * slots_.size() : slots_.size());
    old.swap(slots_);
    used_ = kept;
    for (const Slot& slot : old) {
      if (slot.used() && slot.value < kNone) slots_[place(slot.key)] = slot;
    }
  }

  Slots slots_;  // a power of two of them
  std::size_t used_ = 0;
};

}  // namespace fitcompress
