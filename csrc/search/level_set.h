// A set of levels, one bit each.
#pragma once

#include <cstdint>
#include <vector>

#include "search/level_lists.h"

namespace fitcompress {

class LevelSet {
 public:
  explicit LevelSet(std::int32_t levels) : words_((static_cast<std::size_t>(levels) + 63) / 64) {}

  void insert(std::int32_t level) {
    words_[static_cast<std::size_t>(level) / 64] |= std::uint64_t{1} << (level % 64);
  }

  bool contains(std::int32_t level) const {
    return (words_[static_cast<std::size_t>(level) / 64] >> (level % 64) & 1) != 0;
  }

  // The lists without all other levels; origin: the level there. Returns whether all layers have
  // one left.
  bool select(const LevelLists& from, LevelLists* lists) const {
    lists->clear();
    lists->budgets = from.budgets;
    bool all = true;
    std::int32_t layer = 0;
    const auto end_layers_before = [&](std::int32_t level) {
      for (; layer < from.layers() && from.begin[static_cast<std::size_t>(layer) + 1] <= level;
           ++layer) {
        all = all && lists->begin.back() < lists->size();
        lists->end_layer();
      }
    };
    for (std::size_t w = 0; w < words_.size(); ++w) {
      for (std::uint64_t bits = words_[w]; bits != 0; bits &= bits - 1) {
        const auto level = static_cast<std::int32_t>(w * 64) + __builtin_ctzll(bits);
        end_layers_before(level);
        lists->add(from, level);
      }
    }
    end_layers_before(from.size());
    return all;
  }

 private:
  std::vector<std::uint64_t> words_;
};

}  // namespace fitcompress
