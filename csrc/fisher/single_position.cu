// Squares of samples of a single position. Both tensors are read once and written once in float32:
// bound by memory.
#include "common/dtype.h"
#include "fisher/operand.cuh"
#include "fisher/single_position.cuh"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSamples = 16;  // taken for one, whose products are summed in float32

template <class T>
struct SquareRows {
  const T* from;
  int64_t rows;           // the samples; those written beyond are zero
  int64_t sample, group;  // distances
  int64_t groups, width;
  const int64_t* columns;  // offsets within a group
  float* to;               // [rows, groups, width]
  int64_t count;           // elements of `to`
};

// One thread an element.
template <class T>
__global__ void squares_kernel(SquareRows<T> task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= task.count) return;
  const int64_t column = i % task.width, group = i / task.width % task.groups;
  const int64_t row = i / task.width / task.groups;
  float value = 0.0f;
  if (row < task.rows) {
    value = to_float(task.from[row * task.sample + group * task.group + task.columns[column]]);
  }
  task.to[i] = value * value;
}

template <class T>
const float* square_rows(SquareRows<T> task, int64_t padded_rows, const Scratch& scratch,
                         cudaStream_t queue) {
  task.count = padded_rows * task.groups * task.width;
  task.to = allocate<float>(scratch, task.count);
  squares_kernel<<<grid_size(divide_up(task.count, kThreads)), kThreads, 0, queue>>>(task);
  check_cuda(cudaGetLastError(), "squares");
  return task.to;
}

}  // namespace

template <class T>
Squares make_squares(const WeightGradShape& shape, const T* output_grad, const T* input,
                     const Scratch& scratch, cudaStream_t queue) {
  const Offsets offsets = make_offsets(shape, scratch, queue);
  Squares squares{};
  WeightGradShape& s = squares.shape;
  s.samples = divide_up(shape.samples, kSamples);
  s.images = kSamples;
  s.groups = shape.groups;
  s.outputs = shape.outputs;
  s.channels = shape.inputs();
  s.space = s.places = s.kernel = s.stride = s.dilation = {1, 1, 1};
  s.grad_strides = {s.groups * s.outputs, 1, 1, 1, 1};
  s.input_strides = {s.groups * s.channels, 1, 1, 1, 1};

  SquareRows<T> grad{}, in{};
  grad.from = output_grad;
  grad.rows = in.rows = shape.samples;
  grad.sample = shape.grad_strides[0];
  grad.group = shape.grad_strides[1];
  grad.groups = s.groups * s.outputs;
  grad.width = 1;
  grad.columns = offsets.grad_positions;  // 0
  in.from = input;
  in.sample = shape.input_strides[0];
  in.group = shape.channels * shape.input_strides[1];
  in.groups = s.groups;
  in.width = s.channels;
  in.columns = offsets.inputs;
  squares.output_grad = square_rows(grad, s.samples * kSamples, scratch, queue);
  squares.input = square_rows(in, s.samples * kSamples, scratch, queue);
  return squares;
}

template Squares make_squares(const WeightGradShape&, const float*, const float*, const Scratch&,
                              cudaStream_t);
template Squares make_squares(const WeightGradShape&, const BFloat16*, const BFloat16*,
                              const Scratch&, cudaStream_t);
template Squares make_squares(const WeightGradShape&, const Float16*, const Float16*,
                              const Scratch&, cudaStream_t);

}  // namespace fitcompress
