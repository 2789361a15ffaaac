// Error-feedback sweep on CUDA, in float64.
//
// A block owns a row and goes through its columns; for each, every thread works out the same code
// and error, then subtracts from its share of the later columns: coalesced reads of one row of U,
// which all blocks share through the cache. Products and differences are rounded one by one (no
// fused multiply-add in this file), so codes have the same bits as on the CPU. Bound: R·N²/2
// elements of U read from the level-2 cache, and N synchronisations of a block.
#include "common/cuda.h"
#include "compensate/error_feedback_sweep.h"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;
constexpr double kCodeLimit = 2147483647.0;

__global__ void sweep_kernel(SweepShape shape, double* work, const double* factor,
                             const double* scale, const uint8_t* mask, int32_t* codes,
                             int32_t* bad) {
  const int64_t row = blockIdx.x;
  const int64_t cols = shape.cols;
  double* const w = work + row * cols;
  const double step = scale[shape.scale_per_row ? row : 0];
  for (int64_t j = 0; j < cols; ++j) {
    const double* const u = factor + j * cols;
    const double value = w[j];
    double code = 0.0;
    if (step > 0.0 && (mask == nullptr || mask[row * cols + j] != 0)) {
      code = rint(value / step) + 0.0;
      code = code < -shape.max_code ? -shape.max_code : code;
      code = code > shape.max_code ? shape.max_code : code;
      if (!(code >= -kCodeLimit && code <= kCodeLimit)) {
        code = 0.0;
        if (threadIdx.x == 0) *bad = 1;
      }
    }
    if (threadIdx.x == 0) codes[row * cols + j] = static_cast<int32_t>(code);
    const double error = (value - code * step) / u[j];
    for (int64_t c = j + 1 + threadIdx.x; c < cols; c += kThreads) w[c] -= error * u[c];
    __syncthreads();  // w[j + 1] is final
  }
}

}  // namespace

bool error_feedback_sweep_cuda(SweepShape shape, double* work, const double* factor,
                               const double* scale, const uint8_t* mask, int32_t* codes, int device,
                               void* stream, const Scratch& scratch) {
  if (shape.rows == 0 || shape.cols == 0) return true;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  int32_t* const bad = allocate<int32_t>(scratch, 1);
  check_cuda(cudaMemsetAsync(bad, 0, sizeof(*bad), queue), "error_feedback_sweep");
  sweep_kernel<<<static_cast<unsigned>(shape.rows), kThreads, 0, queue>>>(shape, work, factor,
                                                                          scale, mask, codes, bad);
  check_cuda(cudaGetLastError(), "error_feedback_sweep");
  int32_t any_bad = 0;
  check_cuda(cudaMemcpyAsync(&any_bad, bad, sizeof(any_bad), cudaMemcpyDeviceToHost, queue),
             "error_feedback_sweep");
  check_cuda(cudaStreamSynchronize(queue), "error_feedback_sweep");
  return any_bad == 0;
}

}  // namespace fitcompress
