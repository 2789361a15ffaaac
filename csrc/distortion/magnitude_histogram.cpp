// Histogram of magnitudes on the CPU. A task is one chunk of the weights with counters of its own,
// 16 chunks at the most and none for fewer than 2^20 weights. Bins are found in vectors, a block at
// a time; then one counter is raised a weight. Two counters a bin take turns, since raising the
// same one at once would wait for it. Bound: the increments, about a nanosecond each.
#include "distortion/magnitude_histogram.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/vector.h"

namespace fitcompress {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kWays = 2;
constexpr int64_t kLeastChunk = int64_t{1} << 20;
constexpr int64_t kMostChunks = 16;

template <class T>
void count_chunk(const T* weight, int64_t count, uint32_t* counters) {
  dispatch_isa([&](auto) __attribute__((always_inline)) {
    uint32_t bins[kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t here = std::min(kBlock, count - first);
      for (int64_t j = 0; j < here; ++j) {
        bins[j] = (bits_of_float(to_float(weight[first + j])) & 0x7fffffffu) >> 16;
      }
      for (int64_t j = 0; j < here; ++j) ++counters[bins[j] * kWays + j % kWays];
    }
  });
}

}  // namespace

template <class T>
void magnitude_histogram_cpu(const T* weight, int64_t count, int64_t* counts) {
  std::fill_n(counts, kMagnitudeBins, 0);
  // Counters have 32 bits: longer chunks are counted in turns.
  constexpr int64_t kTurn = int64_t{1} << 31;
  const int64_t chunks = std::clamp<int64_t>(count / kLeastChunk, 1, kMostChunks);
  const auto counters = make_buffer<uint32_t>(chunks * kMagnitudeBins * kWays);
  for (int64_t turn = 0; turn < count; turn += kTurn) {
    const int64_t here = std::min(kTurn, count - turn);
    const int64_t chunk = ceil_div(here, chunks);
    parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        uint32_t* const own = counters.get() + c * kMagnitudeBins * kWays;
        std::fill_n(own, kMagnitudeBins * kWays, 0u);
        const int64_t begin = std::min(c * chunk, here), end = std::min(begin + chunk, here);
        count_chunk(weight + turn + begin, end - begin, own);
      }
    });
    for (int64_t i = 0; i < chunks * kMagnitudeBins * kWays; ++i) {
      counts[i / kWays % kMagnitudeBins] += counters[static_cast<size_t>(i)];
    }
  }
}

template void magnitude_histogram_cpu<float>(const float*, int64_t, int64_t*);
template void magnitude_histogram_cpu<BFloat16>(const BFloat16*, int64_t, int64_t*);
template void magnitude_histogram_cpu<Float16>(const Float16*, int64_t, int64_t*);

}  // namespace fitcompress
