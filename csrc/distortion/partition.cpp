// Finds the classes without sorting: the bit pattern of a positive float grows with its value, so a
// histogram over the leading 16 bits locates every threshold; only the few bins that hold one are
// sorted. Two reads of the importance, one write of 2 bytes an element.
#include "distortion/partition.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/parallel.h"

namespace fitcompress {
namespace {

constexpr int64_t kBins = 1 << 15;  // sign bit is 0
constexpr int64_t kChunks = 16;     // fixed, so that nothing depends on the number of threads
constexpr uint16_t kMixed = 65535;  // a bin with a threshold inside

using Entry = std::pair<uint32_t, int64_t>;  // pattern, index: ordered as weights leave

uint32_t pattern(float importance) {
  uint32_t bits;
  std::memcpy(&bits, &importance, sizeof(bits));
  return bits & 0x7fffffffu;  // −0 is 0
}

}  // namespace

void classify_by_importance(const float* importance, int64_t count,
                            const std::vector<int64_t>& dropped, uint16_t* class_of) {
  const int64_t chunk = std::max<int64_t>((count + kChunks - 1) / kChunks, 1);
  std::vector<std::vector<int64_t>> histograms(kChunks, std::vector<int64_t>(kBins, 0));
  parallel_for(kChunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t* const histogram = histograms[static_cast<size_t>(c)].data();
      const int64_t end = std::min((c + 1) * chunk, count);
      for (int64_t i = c * chunk; i < end; ++i) ++histogram[pattern(importance[i]) >> 16];
    }
  });

  // The class of the weight that leaves as number `rank`.
  const auto class_at = [&](int64_t rank) {
    return static_cast<uint16_t>(std::upper_bound(dropped.begin(), dropped.end(), rank) -
                                 dropped.begin());
  };
  std::vector<uint16_t> bin_class(kBins);
  std::vector<int64_t> bin_rank(kBins);
  std::vector<int64_t> mixed_bins;
  int64_t rank = 0;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    int64_t size = 0;
    for (const auto& histogram : histograms) size += histogram[static_cast<size_t>(bin)];
    bin_rank[static_cast<size_t>(bin)] = rank;
    if (size == 0) continue;
    const uint16_t lowest = class_at(rank);
    const bool mixed = lowest != class_at(rank + size - 1);
    bin_class[static_cast<size_t>(bin)] = mixed ? kMixed : lowest;
    if (mixed) mixed_bins.push_back(bin);
    rank += size;
  }

  // Room for the entries of the mixed bins: by bin, then by chunk, so in order of index. Everything
  // is allocated here, because nothing may throw on another thread.
  std::vector<uint16_t> list_of(kBins, 0);
  std::vector<size_t> list_begin(mixed_bins.size() + 1, 0);
  std::vector<size_t> cursor(static_cast<size_t>(kChunks) * mixed_bins.size());
  size_t entries_total = 0;
  for (size_t list = 0; list < mixed_bins.size(); ++list) {
    const auto bin = static_cast<size_t>(mixed_bins[list]);
    list_of[bin] = static_cast<uint16_t>(list);
    for (size_t c = 0; c < static_cast<size_t>(kChunks); ++c) {
      cursor[c * mixed_bins.size() + list] = entries_total;
      entries_total += static_cast<size_t>(histograms[c][bin]);
    }
    list_begin[list + 1] = entries_total;
  }
  std::vector<Entry> entries(entries_total);

  parallel_for(kChunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      size_t* const next = cursor.data() + static_cast<size_t>(c) * mixed_bins.size();
      const int64_t end = std::min((c + 1) * chunk, count);
      for (int64_t i = c * chunk; i < end; ++i) {
        const uint32_t key = pattern(importance[i]);
        class_of[i] = bin_class[key >> 16];
        if (class_of[i] == kMixed) entries[next[list_of[key >> 16]]++] = {key, i};
      }
    }
  });
  parallel_for(static_cast<int64_t>(mixed_bins.size()), 1, [&](int64_t first, int64_t last) {
    for (auto list = static_cast<size_t>(first); list < static_cast<size_t>(last); ++list) {
      std::sort(entries.begin() + static_cast<std::ptrdiff_t>(list_begin[list]),
                entries.begin() + static_cast<std::ptrdiff_t>(list_begin[list + 1]));
      int64_t leaving = bin_rank[static_cast<size_t>(mixed_bins[list])];
      for (size_t e = list_begin[list]; e < list_begin[list + 1]; ++e) {
        class_of[entries[e].second] = class_at(leaving++);
      }
    }
  });
}

}  // namespace fitcompress
