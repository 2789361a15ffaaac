// ŵ = mask · Δ · clip(round(w / Δ), −q, q) and its gradient on CUDA.
//
// A block owns one piece of a row, at most kQuantizePiece elements with one Δ, and its threads take
// neighbouring elements. Forward reads w and one bit an element and writes ŵ; backward also reads
// the gradient, and leaves one float64 sum a piece, which a second kernel adds up a row. The same
// bits as on the CPU, but for the order of these sums. Bound: memory.
#include <algorithm>

#include "common/cuda.h"
#include "common/dtype.h"
#include "quantize/fake_quantize_prune.h"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;

struct Piece {
  int64_t row, begin, end;
  __device__ explicit Piece(const QuantizePruneShape& shape, int64_t per_row)
      : row(blockIdx.x / per_row),
        begin(row * shape.cols + (blockIdx.x % per_row) * kQuantizePiece),
        end(min(begin + kQuantizePiece, (row + 1) * shape.cols)) {}
};

__device__ bool keeps(const uint8_t* mask, int64_t i) {
  return mask == nullptr || ((mask[i / 8] >> (i % 8)) & 1) != 0;
}

__device__ float clip(float code, float max_code) {  // NaN stays NaN
  code = code < -max_code ? -max_code : code;
  return code > max_code ? max_code : code;
}

template <class T>
__global__ void forward_kernel(QuantizePruneShape shape, int64_t per_row, const T* weight,
                               const float* scale, const uint8_t* mask, T* result) {
  const Piece piece(shape, per_row);
  const float step = scale[piece.row];
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) {
    float value = 0.0f;
    if (step > 0.0f && keeps(mask, i)) {
      value = step * clip(rintf(to_float(weight[i]) / step) + 0.0f, shape.max_code);
    }
    from_float(value, &result[i]);
  }
}

template <class T>
__global__ void backward_kernel(QuantizePruneShape shape, int64_t per_row, const T* grad,
                                const T* weight, const float* scale, const uint8_t* mask,
                                T* grad_weight, double* partial) {
  const Piece piece(shape, per_row);
  const float step = scale[piece.row];
  double sum = 0.0;
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) {
    float gradient = 0.0f;
    if (step > 0.0f && keeps(mask, i)) {
      const float x = to_float(weight[i]) / step;
      const float code = rintf(x);
      const float clipped = clip(code, shape.max_code);
      const float incoming = to_float(grad[i]);
      const bool inside = clipped == code;
      if (inside) gradient = incoming;
      sum += incoming * (inside ? code - x : clipped);
    }
    from_float(gradient, &grad_weight[i]);
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void sum_pieces_kernel(int64_t per_row, const double* partial, float* grad_scale) {
  const double* const row = partial + blockIdx.x * per_row;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < per_row; i += kThreads) sum += row[i];
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) grad_scale[blockIdx.x] = static_cast<float>(total);
}

}  // namespace

template <class T>
void fake_quantize_prune_cuda(QuantizePruneShape shape, const T* weight, const float* scale,
                              const uint8_t* mask, T* result, int device, void* stream) {
  const int64_t per_row = pieces_per_row(shape.cols);
  const auto blocks = static_cast<unsigned>(shape.rows * per_row);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  forward_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(shape, per_row, weight,
                                                                             scale, mask, result);
  check_cuda(cudaGetLastError(), "fake_quantize_prune");
}

template <class T>
void fake_quantize_prune_backward_cuda(QuantizePruneShape shape, const T* grad, const T* weight,
                                       const float* scale, const uint8_t* mask, T* grad_weight,
                                       float* grad_scale, int device, void* stream,
                                       const Scratch& scratch) {
  if (shape.rows == 0) return;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const int64_t per_row = pieces_per_row(shape.cols);
  const auto blocks = static_cast<unsigned>(shape.rows * per_row);
  double* const partial = allocate<double>(scratch, blocks);
  if (blocks > 0) {
    backward_kernel<<<blocks, kThreads, 0, queue>>>(shape, per_row, grad, weight, scale, mask,
                                                    grad_weight, partial);
  }
  sum_pieces_kernel<<<static_cast<unsigned>(shape.rows), kThreads, 0, queue>>>(per_row, partial,
                                                                               grad_scale);
  check_cuda(cudaGetLastError(), "fake_quantize_prune_backward");
}

#define INSTANTIATE(T)                                                                         \
  template void fake_quantize_prune_cuda<T>(QuantizePruneShape, const T*, const float*,        \
                                            const uint8_t*, T*, int, void*);                   \
  template void fake_quantize_prune_backward_cuda<T>(QuantizePruneShape, const T*, const T*,   \
                                                     const float*, const uint8_t*, T*, float*, \
                                                     int, void*, const Scratch&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
