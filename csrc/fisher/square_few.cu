// Squared weight gradients of groups with few weights, as in depthwise convolutions, on CUDA.
//
// A warp owns one output, one channel and up to 9 kernel offsets (a 3 × 3 kernel) for a slice of
// the samples; its lanes share the positions. The tensors are read as they are: the gradient once
// per channel and 9 offsets, the input once per output and offset, mostly from the cache. Bound: by
// memory, each tensor read once.
#include "common/dtype.h"
#include "fisher/operand.cuh"
#include "fisher/partial_sums.cuh"
#include "fisher/square_few.cuh"

namespace fitcompress {
namespace {

constexpr int kOffsets = 9;
constexpr int kThreads = 128;
constexpr unsigned kWarp = 32;

template <class T>
struct FewTask {
  const T *output_grad, *input;
  Offsets offsets;
  int64_t grad_sample, grad_channel, input_sample, input_channel;  // distances
  int64_t positions, samples, slice;
  int64_t outputs, channels, kernel_volume;
  int64_t pieces, units;  // pieces of the kernel; warps of a slice
  int64_t warps;
  MomentSink moment;
  double* norms;  // [samples, units]; null: not needed
};

template <class T>
__global__ void __launch_bounds__(kThreads) few_kernel(FewTask<T> task) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (warp >= task.warps) return;
  const int64_t unit = warp % task.units, slice = warp / task.units;
  const int64_t first_k = unit % task.pieces * kOffsets;
  const int64_t weight = unit / task.pieces;  // group, output, channel
  const int64_t output = weight / task.channels;
  const int64_t channel = output / task.outputs * task.channels + weight % task.channels;
  int64_t offsets[kOffsets];
#pragma unroll
  for (int k = 0; k < kOffsets; ++k) {
    offsets[k] = first_k + k < task.kernel_volume ? task.offsets.inputs[first_k + k] : -1;
  }
  double total[kOffsets] = {};
  const int64_t first = slice * task.slice, last = min(first + task.slice, task.samples);
  for (int64_t sample = first; sample < last; ++sample) {
    const T* const e = task.output_grad + sample * task.grad_sample + output * task.grad_channel;
    const T* const x = task.input + sample * task.input_sample + channel * task.input_channel;
    float sum[kOffsets] = {};
    for (int64_t p = lane; p < task.positions; p += kWarp) {
      const float grad = to_float(e[task.offsets.grad_positions[p]]);
      const T* const at = x + task.offsets.input_positions[p];
#pragma unroll
      for (int k = 0; k < kOffsets; ++k) {
        if (offsets[k] >= 0) sum[k] += grad * to_float(at[offsets[k]]);
      }
    }
    double norm = 0.0;
#pragma unroll
    for (int k = 0; k < kOffsets; ++k) {
      const double value = warp_sum(sum[k]);
      total[k] += value * value;
      norm += value * value;
    }
    if (task.norms != nullptr && lane == 0) task.norms[sample * task.units + unit] = norm;
  }
  if (!task.moment.wanted() || lane != 0) return;
#pragma unroll
  for (int k = 0; k < kOffsets; ++k) {
    if (offsets[k] < 0) continue;
    task.moment.add(slice, weight * task.kernel_volume + first_k + k, total[k], true);
  }
}

}  // namespace

template <class T, class Moment>
void square_few(const WeightGradShape& shape, const T* output_grad, const T* input, double scale,
                Moment* moment, double* norms, const Scratch& scratch, cudaStream_t queue) {
  constexpr int64_t kWarpsWanted = 1 << 13;  // to fill a device
  FewTask<T> task{};
  task.output_grad = output_grad;
  task.input = input;
  task.offsets = make_offsets(shape, scratch, queue);
  task.grad_sample = shape.images * shape.grad_strides[0];
  task.grad_channel = shape.grad_strides[1];
  task.input_sample = shape.images * shape.input_strides[0];
  task.input_channel = shape.input_strides[1];
  task.positions = shape.images * shape.positions();
  task.samples = shape.samples;
  task.outputs = shape.outputs;
  task.channels = shape.channels;
  task.kernel_volume = shape.kernel_volume();
  task.pieces = divide_up(task.kernel_volume, kOffsets);
  task.units = shape.groups * shape.outputs * shape.channels * task.pieces;
  const Slices slices = cut_samples(shape.samples, divide_up(kWarpsWanted, task.units), 1);
  task.slice = slices.length;
  task.warps = task.units * slices.count;
  const int64_t size = shape.groups * shape.outputs * shape.inputs();
  task.moment = make_sink(moment, slices.count, size, scale, scratch);
  if (norms != nullptr) task.norms = allocate<double>(scratch, shape.samples * task.units);

  const unsigned blocks = grid_size(divide_up(task.warps * kWarp, kThreads));
  few_kernel<<<blocks, kThreads, 0, queue>>>(task);
  check_cuda(cudaGetLastError(), "square_accumulate_");
  if (task.moment.slice > 0) {
    add_moments(task.moment.twice, slices.count, size, scale, moment, queue);
  }
  if (norms != nullptr) add_norms(task.norms, shape.samples, task.units, scale, norms, queue);
}

#define INSTANTIATE(T, Moment)                                                                   \
  template void square_few(const WeightGradShape&, const T*, const T*, double, Moment*, double*, \
                           const Scratch&, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(float, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(BFloat16, double)
INSTANTIATE(Float16, float)
INSTANTIATE(Float16, double)
#undef INSTANTIATE

}  // namespace fitcompress
