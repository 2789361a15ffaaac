// Finds the classes without sorting: the bit pattern of a positive float grows with its value, so a
// histogram over the leading 16 bits locates every threshold; only the few bins that hold one are
// looked at more closely, by selection. Two reads of the importance, one write of 2 bytes an
// element.
#include "distortion/partition.h"

#include <algorithm>
#include <cstring>

#include "common/buffer.h"
#include "common/parallel.h"

namespace fitcompress {
namespace {

constexpr int64_t kBins = 1 << 15;  // sign bit is 0
constexpr uint16_t kMixed = 65535;  // a bin with a threshold inside

// The trailing 16 bits of the pattern, then the index: ordered as the weights of a bin leave.
using Entry = uint64_t;
constexpr int kIndexBits = 48;

uint32_t pattern(float importance) {
  uint32_t bits;
  std::memcpy(&bits, &importance, sizeof(bits));
  return bits & 0x7fffffffu;  // −0 is 0
}

}  // namespace

void classify_by_importance(const float* importance, int64_t count,
                            const std::vector<int64_t>& dropped, uint16_t* class_of) {
  // A histogram is large: at most 16 of them, and few for a small layer.
  const int64_t chunks = std::clamp<int64_t>(count / kBins, 1, 16);
  const int64_t chunk = (count + chunks - 1) / chunks;
  std::vector<std::vector<int64_t>> histograms(static_cast<size_t>(chunks),
                                               std::vector<int64_t>(kBins, 0));
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
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
  std::vector<size_t> cursor(histograms.size() * mixed_bins.size());
  size_t entries_total = 0;
  for (size_t list = 0; list < mixed_bins.size(); ++list) {
    const auto bin = static_cast<size_t>(mixed_bins[list]);
    list_of[bin] = static_cast<uint16_t>(list);
    for (size_t c = 0; c < histograms.size(); ++c) {
      cursor[c * mixed_bins.size() + list] = entries_total;
      entries_total += static_cast<size_t>(histograms[c][bin]);
    }
    list_begin[list + 1] = entries_total;
  }
  const Buffer<Entry> entries = make_buffer<Entry>(static_cast<int64_t>(entries_total));

  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      size_t* const next = cursor.data() + static_cast<size_t>(c) * mixed_bins.size();
      const int64_t end = std::min((c + 1) * chunk, count);
      for (int64_t i = c * chunk; i < end; ++i) {
        const uint32_t key = pattern(importance[i]);
        class_of[i] = bin_class[key >> 16];
        if (class_of[i] == kMixed) {
          entries[next[list_of[key >> 16]]++] =
              (Entry{key & 0xffffu} << kIndexBits) | static_cast<Entry>(i);
        }
      }
    }
  });
  parallel_for(static_cast<int64_t>(mixed_bins.size()), 1, [&](int64_t first, int64_t last) {
    for (auto list = static_cast<size_t>(first); list < static_cast<size_t>(last); ++list) {
      // One selection a threshold: what is below it belongs to one class.
      Entry* begin = entries.get() + list_begin[list];
      Entry* const end = entries.get() + list_begin[list + 1];
      int64_t leaving = bin_rank[static_cast<size_t>(mixed_bins[list])];
      while (begin != end) {
        const uint16_t own = class_at(leaving);
        Entry* middle = end;
        if (own < dropped.size()) middle = std::min(end, begin + (dropped[own] - leaving));
        if (middle != end) std::nth_element(begin, middle, end);
        leaving += middle - begin;
        for (; begin != middle; ++begin) {
          class_of[*begin & ((Entry{1} << kIndexBits) - 1)] = own;
        }
      }
    }
  });
}

}  // namespace fitcompress
