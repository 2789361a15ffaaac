// Histogram of magnitudes on CUDA: every weight raises one of the counters in global memory, which
// are integers, so the order does not matter. Bound: the atomics of the fullest bins.
#include <algorithm>

#include "common/cuda.h"
#include "common/dtype.h"
#include "distortion/magnitude_histogram.h"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;

template <class T>
__global__ void count_kernel(const T* weight, int64_t count, unsigned long long* counts) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += stride) {
    const unsigned bin = (bits_of_float(to_float(weight[i])) & 0x7fffffffu) >> 16;
    atomicAdd(&counts[bin], 1ull);
  }
}

}  // namespace

template <class T>
void magnitude_histogram_cuda(const T* weight, int64_t count, int64_t* counts, int device,
                              void* stream) {
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemsetAsync(counts, 0, sizeof(*counts) * kMagnitudeBins, queue),
             "magnitude_histogram");
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(std::min(divide_up(count, kThreads), kMostBlocks));
  count_kernel<<<blocks, kThreads, 0, queue>>>(weight, count,
                                               reinterpret_cast<unsigned long long*>(counts));
  check_cuda(cudaGetLastError(), "magnitude_histogram");
}

template void magnitude_histogram_cuda<float>(const float*, int64_t, int64_t*, int, void*);
template void magnitude_histogram_cuda<BFloat16>(const BFloat16*, int64_t, int64_t*, int, void*);
template void magnitude_histogram_cuda<Float16>(const Float16*, int64_t, int64_t*, int, void*);

}  // namespace fitcompress
