// Thresholds on CUDA, without a sort: which weight is the first that stays at each sparsity.
//
// Keys have 31 bits. A histogram of the leading 16 says in which bin a threshold lies; a second one
// of the trailing 15, of those bins only, gives its key, and how many of the equal keys leave.
// These are the first ones, so the equal keys are counted a piece at a time, and one block a
// threshold looks for the place in its piece. Counts are the only atomics. Bound: three reads of
// what the importance is made of, for up to kAtOnce thresholds.
#include <algorithm>

#include "distortion/device_layer.cuh"

namespace fitcompress {
namespace {

constexpr int kLowBits = 15;
constexpr int64_t kHighBins = 1 << 16;
constexpr int64_t kLowBins = 1 << kLowBits;
constexpr int kAtOnce = 64;           // thresholds
constexpr int64_t kMaxPieces = 4096;  // for the search of places

using Count = unsigned long long;

template <class T>
__global__ void high_kernel(DeviceLayer<T> layer, Count* histogram) {
  const int64_t begin = blockIdx.x * kLayerPiece;
  const int64_t end = min(begin + kLayerPiece, layer.count());
  Count zeros = 0;  // often many, so not one by one
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const uint32_t key = key_of(layer, i);
    if (key == 0) {
      ++zeros;
    } else {
      atomicAdd(&histogram[key >> kLowBits], Count{1});
    }
  }
  zeros = block_sum<kLayerThreads>(zeros);
  if (threadIdx.x == 0 && zeros > 0) atomicAdd(&histogram[0], zeros);
}

// row_of_bin: which row of the histogram a bin of the first one has, or -1.
template <class T>
__global__ void low_kernel(DeviceLayer<T> layer, const int* row_of_bin, Count* histogram) {
  const int64_t begin = blockIdx.x * kLayerPiece;
  const int64_t end = min(begin + kLayerPiece, layer.count());
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const uint32_t key = key_of(layer, i);
    const int row = row_of_bin[key >> kLowBits];
    if (row >= 0) atomicAdd(&histogram[row * kLowBins + (key & (kLowBins - 1))], Count{1});
  }
}

// How many weights of each piece have each of at most kAtOnce keys, [pieces, keys].
template <class T>
__global__ void equal_kernel(DeviceLayer<T> layer, int64_t piece, const uint32_t* keys,
                             int key_count, unsigned int* counts) {
  __shared__ unsigned int equal[kAtOnce];
  if (static_cast<int>(threadIdx.x) < kAtOnce) equal[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * piece;
  const int64_t end = min(begin + piece, layer.count());
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const uint32_t key = key_of(layer, i);
    for (int k = 0; k < key_count; ++k) {
      if (keys[k] == key) atomicAdd(&equal[k], 1u);
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < key_count) {
    counts[blockIdx.x * static_cast<int64_t>(key_count) + threadIdx.x] = equal[threadIdx.x];
  }
}

// The place to find: the weight with this key and `rank` others before it from `begin` on.
struct Search {
  int64_t begin, rank;
  uint32_t key;
};

template <class T>
__global__ void place_kernel(DeviceLayer<T> layer, int64_t piece, const Search* searches,
                             int64_t* places) {
  __shared__ int64_t before[kLayerThreads];
  const Search search = searches[blockIdx.x];
  const int64_t share = (piece + kLayerThreads - 1) / kLayerThreads;
  const int64_t end = min(search.begin + piece, layer.count());
  const int64_t first = min(search.begin + threadIdx.x * share, end);
  const int64_t last = min(first + share, end);
  int64_t found = 0;
  for (int64_t i = first; i < last; ++i) found += key_of(layer, i) == search.key;
  before[threadIdx.x] = found;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int t = 0; t < kLayerThreads; ++t) {
      const int64_t here = before[t];
      before[t] = sum;
      sum += here;
    }
  }
  __syncthreads();
  int64_t rank = search.rank - before[threadIdx.x];
  if (rank < 0 || rank >= found) return;
  for (int64_t i = first; i < last; ++i) {
    if (key_of(layer, i) == search.key && rank-- == 0) places[blockIdx.x] = i;
  }
}

template <class T>
std::vector<T> download(const T* values, int64_t count, const DeviceQueue& queue) {
  std::vector<T> copy(static_cast<size_t>(count));
  queue.to_host(copy.data(), values, count * static_cast<int64_t>(sizeof(T)));
  return copy;
}

void clear(void* memory, int64_t bytes, const DeviceQueue& queue) {
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_of(queue)),
             "distortion_table");
}

// Moves on to the bin that holds the element of this rank; the rank becomes that within the bin.
int64_t find_bin(const Count* histogram, int64_t bins, int64_t* rank) {
  int64_t bin = 0;
  while (bin + 1 < bins && *rank >= static_cast<int64_t>(histogram[bin])) {
    *rank -= static_cast<int64_t>(histogram[bin++]);
  }
  return bin;
}

// Memory for kAtOnce thresholds or fewer.
struct Workspace {
  int* row_of_bin;
  Count* low;
  uint32_t* keys;
  unsigned int* equal;
  Search* searches;
  int64_t* places;

  Workspace(int64_t thresholds, int64_t pieces, const Scratch& scratch)
      : row_of_bin(allocate<int>(scratch, kHighBins)),
        low(allocate<Count>(scratch, thresholds * kLowBins)),
        keys(allocate<uint32_t>(scratch, thresholds)),
        equal(allocate<unsigned int>(scratch, thresholds * pieces)),
        searches(allocate<Search>(scratch, thresholds)),
        places(allocate<int64_t>(scratch, thresholds)) {}
};

// The keys of up to kAtOnce thresholds of these ranks; ranks become those among the equal keys.
template <class T>
std::vector<uint32_t> find_keys(const DeviceLayer<T>& layer, const std::vector<Count>& high,
                                const Workspace& space, const DeviceQueue& queue,
                                std::vector<int64_t>* ranks) {
  std::vector<int> row_of_bin(static_cast<size_t>(kHighBins), -1);
  std::vector<int64_t> bins;
  int rows = 0;
  for (int64_t& rank : *ranks) {
    bins.push_back(find_bin(high.data(), kHighBins, &rank));
    int& row = row_of_bin[static_cast<size_t>(bins.back())];
    if (row < 0) row = rows++;
  }
  queue.to_device(space.row_of_bin, row_of_bin.data(), kHighBins * sizeof(int));
  clear(space.low, rows * kLowBins * static_cast<int64_t>(sizeof(Count)), queue);
  low_kernel<<<layer_blocks(layer.count()), kLayerThreads, 0, stream_of(queue)>>>(
      layer, space.row_of_bin, space.low);
  check_cuda(cudaGetLastError(), "distortion_table");
  const std::vector<Count> low = download(space.low, rows * kLowBins, queue);
  std::vector<uint32_t> keys;
  for (size_t s = 0; s < ranks->size(); ++s) {
    const int row = row_of_bin[static_cast<size_t>(bins[s])];
    const int64_t last = find_bin(low.data() + row * kLowBins, kLowBins, &(*ranks)[s]);
    keys.push_back(static_cast<uint32_t>(bins[s] * kLowBins + last));
  }
  return keys;
}

template <class T>
std::vector<int64_t> find_places(const DeviceLayer<T>& layer, int64_t piece,
                                 const std::vector<uint32_t>& keys, std::vector<int64_t> ranks,
                                 const Workspace& space, const DeviceQueue& queue) {
  const auto size = static_cast<int64_t>(keys.size());
  const int64_t pieces = divide_up(layer.count(), piece);
  queue.to_device(space.keys, keys.data(), size * static_cast<int64_t>(sizeof(uint32_t)));
  equal_kernel<<<grid_size(pieces), kLayerThreads, 0, stream_of(queue)>>>(
      layer, piece, space.keys, static_cast<int>(size), space.equal);
  check_cuda(cudaGetLastError(), "distortion_table");
  const std::vector<unsigned int> equal = download(space.equal, pieces * size, queue);
  std::vector<Search> searches;
  for (int64_t s = 0; s < size; ++s) {
    int64_t& rank = ranks[static_cast<size_t>(s)];
    int64_t p = 0;
    while (p + 1 < pieces && rank >= equal[static_cast<size_t>(p * size + s)]) {
      rank -= equal[static_cast<size_t>(p++ * size + s)];
    }
    searches.push_back({p * piece, rank, keys[static_cast<size_t>(s)]});
  }
  queue.to_device(space.searches, searches.data(), size * static_cast<int64_t>(sizeof(Search)));
  place_kernel<<<grid_size(size), kLayerThreads, 0, stream_of(queue)>>>(
      layer, piece, space.searches, space.places);
  check_cuda(cudaGetLastError(), "distortion_table");
  return download(space.places, size, queue);
}

}  // namespace

template <class T>
std::vector<DeviceThreshold> find_thresholds_on_device(const DeviceLayer<T>& layer,
                                                       const std::vector<int64_t>& dropped,
                                                       const DeviceQueue& queue) {
  std::vector<DeviceThreshold> thresholds;
  if (dropped.empty()) return thresholds;
  auto* const histogram = allocate<Count>(*queue.scratch, kHighBins);
  clear(histogram, kHighBins * static_cast<int64_t>(sizeof(Count)), queue);
  high_kernel<<<layer_blocks(layer.count()), kLayerThreads, 0, stream_of(queue)>>>(layer,
                                                                                   histogram);
  check_cuda(cudaGetLastError(), "distortion_table");
  const std::vector<Count> high = download(histogram, kHighBins, queue);
  const int64_t piece = std::max(kLayerPiece, divide_up(layer.count(), kMaxPieces));
  const auto levels = static_cast<int64_t>(dropped.size());
  const Workspace space(std::min<int64_t>(levels, kAtOnce), divide_up(layer.count(), piece),
                        *queue.scratch);
  for (int64_t first = 0; first < levels; first += kAtOnce) {
    std::vector<int64_t> ranks(dropped.begin() + first,
                               dropped.begin() + std::min(first + kAtOnce, levels));
    const std::vector<uint32_t> keys = find_keys(layer, high, space, queue, &ranks);
    const std::vector<int64_t> places = find_places(layer, piece, keys, ranks, space, queue);
    for (size_t s = 0; s < keys.size(); ++s) thresholds.push_back({keys[s], places[s]});
  }
  return thresholds;
}

#define FITCOMPRESS_THRESHOLDS(T)                                     \
  template std::vector<DeviceThreshold> find_thresholds_on_device<T>( \
      const DeviceLayer<T>&, const std::vector<int64_t>&, const DeviceQueue&);
FITCOMPRESS_THRESHOLDS(float)
FITCOMPRESS_THRESHOLDS(BFloat16)
FITCOMPRESS_THRESHOLDS(Float16)

}  // namespace fitcompress
