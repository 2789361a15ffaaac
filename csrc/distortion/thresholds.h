// Which weights leave at which sparsity, without a sort and without a copy.
#pragma once

#include <cstdint>
#include <vector>

#include "distortion/importance.h"
#include "distortion/workspace.h"

namespace fitcompress {

// Masks are nested, so S sparsities cut the weights into S + 1 classes: class k leaves at sparsity
// k for the first time, class S never. The weight with key `key[s]` at `position[s]` is the first,
// in order of (key, flat index), that stays at sparsity s.
struct Thresholds {
  static constexpr int kBinBits = 14;          // keys that differ in these bits only share a bin
  static constexpr uint32_t kBins = 1u << 14;  // 32 octaves of 512; smaller keys share bin 1
  static constexpr uint16_t kMixed = 1u << 15;

  std::vector<uint32_t> key;
  std::vector<int64_t> position;
  uint32_t first_bin = 0;   // key >> kBinBits of bin 0, which holds 0 alone
  bool short_keys = false;  // whether the last kBinBits bits of all keys are 0
  // A bin's class, or, if it holds thresholds, kMixed + the first of them.
  std::vector<uint16_t> bin_class;

  FITCOMPRESS_INLINE uint32_t bin(uint32_t of_key) const {
    const auto place = static_cast<int32_t>(of_key >> kBinBits) - static_cast<int32_t>(first_bin);
    const int32_t at_least_one = place < 1 ? 1 : place;
    const auto last = static_cast<int32_t>(kBins) - 1;
    const int32_t inside = at_least_one > last ? last : at_least_one;
    return of_key == 0 ? 0u : static_cast<uint32_t>(inside);
  }
  // The class of a weight in a bin whose entry in bin_class is `entry`.
  FITCOMPRESS_INLINE uint32_t class_of(uint32_t entry, uint32_t of_key, int64_t index) const {
    if (__builtin_expect(entry < kMixed, 1)) return entry;
    uint32_t at = entry - kMixed;
    while (at < key.size() && (key[at] < of_key || (key[at] == of_key && position[at] <= index))) {
      ++at;
    }
    return at;
  }
  // Whether all keys of a bin are equal. Then the class of its weights grows with their index.
  FITCOMPRESS_INLINE bool one_key(uint32_t of_bin) const {
    return of_bin == 0 || (short_keys && of_bin > 1 && of_bin + 1 < kBins);
  }
};

// dropped: how many weights leave at each sparsity, ascending, fewer than count, at most 32767 of
// them. max_key: no key is larger. memory: bytes of the workspace to use, about.
template <class T>
Thresholds find_thresholds(const Importance<T>& importance, int64_t count,
                           const std::vector<int64_t>& dropped, uint32_t max_key, int64_t memory,
                           Workspace* workspace);

}  // namespace fitcompress
