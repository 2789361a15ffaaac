// Sums of the partial sums of a Fisher kernel. Each is read once: bound by memory.
#include "fisher/partial_sums.cuh"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;

// One block a sample.
__global__ void norms_kernel(const double* parts, int64_t count, double scale, double* norms) {
  const double* const mine = parts + blockIdx.x * count;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += mine[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] += scale * sum;
}

// One thread an element.
template <class Moment>
__global__ void moments_kernel(const double* slices, int64_t count, int64_t size, double scale,
                               Moment* moment) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double sum = 0.0;
  for (int64_t slice = 0; slice < count; ++slice) sum += slices[slice * size + i];
  moment[i] = static_cast<Moment>(moment[i] + scale * sum);
}

}  // namespace

void add_norms(const double* parts, int64_t samples, int64_t count, double scale, double* norms,
               cudaStream_t queue) {
  norms_kernel<<<grid_size(samples), kThreads, 0, queue>>>(parts, count, scale, norms);
  check_cuda(cudaGetLastError(), "sums of norms");
}

template <class Moment>
void add_moments(const double* slices, int64_t count, int64_t size, double scale, Moment* moment,
                 cudaStream_t queue) {
  const unsigned blocks = grid_size(divide_up(size, kThreads));
  moments_kernel<<<blocks, kThreads, 0, queue>>>(slices, count, size, scale, moment);
  check_cuda(cudaGetLastError(), "sums of moments");
}

template void add_moments(const double*, int64_t, int64_t, double, float*, cudaStream_t);
template void add_moments(const double*, int64_t, int64_t, double, double*, cudaStream_t);

}  // namespace fitcompress
