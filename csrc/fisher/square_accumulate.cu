// moment += Σ_b (E_bᵀ A_b)∘² on CUDA: a tiled matrix product whose epilogue squares and adds.
//
// A block of 16 × 16 threads owns 64 × 64 elements of the moment, a thread 4 × 4 of them in
// registers, and runs through all samples; 16 positions of E and A at a time lie in shared memory,
// widened to float32. No element is touched by two blocks: no atomics, one fixed order. Read: E
// once per 64 columns of A and the other way round. Bound: B·P·O·I multiply-adds of float32 on the
// ordinary cores (no tensor cores, which would round the products).
#include "common/cuda.h"
#include "common/dtype.h"
#include "fisher/square_accumulate.h"

namespace fitcompress {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kSide = 16;  // threads along each side of a block
constexpr int kPart = kTile / kSide;

// Loads positions [p, p + kDepth) × columns [column, column + kTile), zero outside the matrix.
template <class T>
__device__ void load_tile(const T* matrix, int64_t positions, int64_t columns, int64_t p,
                          int64_t column, float (*tile)[kTile]) {
  for (int i = threadIdx.y * kSide + threadIdx.x; i < kDepth * kTile; i += kSide * kSide) {
    const int64_t row = p + i / kTile, col = column + i % kTile;
    const bool inside = row < positions && col < columns;
    tile[i / kTile][i % kTile] = inside ? to_float(matrix[row * columns + col]) : 0.0f;
  }
}

template <class T, class Moment>
__global__ void square_accumulate_kernel(SquareAccumulateShape shape, const T* output_grad,
                                         const T* input, Moment* moment) {
  __shared__ float errors[kDepth][kTile];
  __shared__ float activations[kDepth][kTile];
  const int64_t first_output = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_input = static_cast<int64_t>(blockIdx.x) * kTile;
  double total[kPart][kPart] = {};
  for (int64_t b = 0; b < shape.samples; ++b) {
    const T* const e = output_grad + b * shape.positions * shape.outputs;
    const T* const a = input + b * shape.positions * shape.inputs;
    float product[kPart][kPart] = {};
    for (int64_t p = 0; p < shape.positions; p += kDepth) {
      load_tile(e, shape.positions, shape.outputs, p, first_output, errors);
      load_tile(a, shape.positions, shape.inputs, p, first_input, activations);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int o = 0; o < kPart; ++o) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) {
            product[o][i] +=
                errors[d][threadIdx.y + o * kSide] * activations[d][threadIdx.x + i * kSide];
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < kPart; ++o) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        total[o][i] += static_cast<double>(product[o][i]) * product[o][i];
      }
    }
  }
  for (int o = 0; o < kPart; ++o) {
    for (int i = 0; i < kPart; ++i) {
      const int64_t output = first_output + threadIdx.y + o * kSide;
      const int64_t in = first_input + threadIdx.x + i * kSide;
      if (output < shape.outputs && in < shape.inputs) {
        Moment* const element = moment + output * shape.inputs + in;
        *element = static_cast<Moment>(*element + total[o][i]);
      }
    }
  }
}

}  // namespace

template <class T, class Moment>
void square_accumulate_cuda(SquareAccumulateShape shape, const T* output_grad, const T* input,
                            Moment* moment, int device, void* stream) {
  if (shape.outputs == 0 || shape.inputs == 0) return;
  const DeviceGuard guard(device);
  const dim3 blocks(static_cast<unsigned>((shape.inputs + kTile - 1) / kTile),
                    static_cast<unsigned>((shape.outputs + kTile - 1) / kTile));
  square_accumulate_kernel<<<blocks, dim3(kSide, kSide), 0, static_cast<cudaStream_t>(stream)>>>(
      shape, output_grad, input, moment);
  check_cuda(cudaGetLastError(), "square_accumulate_");
}

#define INSTANTIATE(T)                                                                       \
  template void square_accumulate_cuda<T, float>(SquareAccumulateShape, const T*, const T*,  \
                                                 float*, int, void*);                        \
  template void square_accumulate_cuda<T, double>(SquareAccumulateShape, const T*, const T*, \
                                                  double*, int, void*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
