// Squared norms of per-sample weight gradients on CUDA, from products of positions.
//
// A block owns a pair of tiles of positions of one sample and group, 64 × 64 or 128 × 128 pairs; it
// forms the products of the output's gradient, then those of the input's patches, both in registers
// (tile.cuh), and sums the products of the two. Pairs of tiles are taken once and count twice off
// the diagonal. Every warp leaves its sum, and these are added in order. Bound: ½ B·P²·(O + I)
// multiply-adds.
//
// With very few positions tiles would be empty: there a block owns one pair of positions. Bound: by
// memory, both tensors read once.
#include "fisher/ghost_norms.h"
#include "fisher/partial_sums.cuh"
#include "fisher/tile.cuh"

namespace fitcompress {
namespace {

// Pair i of a triangle: row ≥ col.
struct Pair {
  int64_t row, col;
};

__device__ Pair pair_of(int64_t i) {
  auto row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(i) + 1.0) - 1.0) * 0.5);
  while (row * (row + 1) / 2 > i) --row;  // the root was rounded
  while ((row + 1) * (row + 2) / 2 <= i) ++row;
  return {row, i - row * (row + 1) / 2};
}

int64_t pairs(int64_t count) { return count * (count + 1) / 2; }

template <class T>
struct GhostTask {
  Operands<T> of;
  int64_t groups, pairs;
  double* norms;  // [samples, groups, pairs, warps]
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    ghost_kernel(GhostTask<typename Tile::T> task) {
  using T = typename Tile::T;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const memory = reinterpret_cast<T*>(shared);
  const Pair tiles = pair_of(blockIdx.x % task.pairs);
  const int64_t group = blockIdx.x / task.pairs % task.groups;
  const int64_t sample = blockIdx.x / task.pairs / task.groups;

  typename Tile::Left left;
  typename Tile::Right right;
  const auto products = [&](const Operand<T>& of, float (&sum)[kSide][kSide]) {
    const T* const data = of.data + sample * of.sample + group * of.group;
    left.look_up_positions(of, static_cast<int>(tiles.row) * Tile::kRows, task.of.positions);
    right.look_up_positions(of, static_cast<int>(tiles.col) * Tile::kCols, task.of.positions);
    left.look_up_columns(of, 0);
    right.look_up_columns(of, 0);
    int to_copy = 0, to_do = of.width;  // columns
    const auto copy = [&](int stage, bool wanted) {
      left.start(data, Tile::left(memory, stage), wanted);
      right.start(data, Tile::right(memory, stage), wanted);
      to_copy += Tile::kDepth;
      left.look_up_columns(of, to_copy);
      right.look_up_columns(of, to_copy);
    };
    const auto use = [&](int stage, auto&& meanwhile) {
      Tile::multiply(Tile::left(memory, stage), Tile::right(memory, stage), to_do, sum, meanwhile);
      to_do -= Tile::kDepth;
    };
    run_pipeline((of.width + Tile::kDepth - 1) / Tile::kDepth, copy, use);
  };
  float grad[kSide][kSide] = {}, input[kSide][kSide] = {};
  products(task.of.grad, grad);
  products(task.of.input, input);

  double norm = 0.0;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    float row = 0.0f;
#pragma unroll
    for (int j = 0; j < kSide; ++j) row += grad[i][j] * input[i][j];
    norm += row;
  }
  norm = warp_sum(norm) * (tiles.row == tiles.col ? 1.0 : 2.0);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * Tile::kWarps + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) task.norms[part] = norm;
}

template <class Tile>
void ghost_tiles(const WeightGradShape& shape, const typename Tile::T* output_grad,
                 const typename Tile::T* input, double scale, double* norms, const Scratch& scratch,
                 cudaStream_t queue) {
  static_assert(Tile::kRows == Tile::kCols);
  using T = typename Tile::T;
  const int64_t positions = shape.images * shape.positions();
  GhostTask<T> task{make_operands(shape, output_grad, input, scratch, queue), shape.groups,
                    pairs(divide_up(positions, Tile::kRows)), nullptr};
  const int64_t blocks = shape.samples * shape.groups * task.pairs;
  task.norms = allocate<double>(scratch, blocks * Tile::kWarps);
  check_cuda(cudaFuncSetAttribute(ghost_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Tile::kBytes),
             "ghost_norms_");
  ghost_kernel<Tile><<<grid_size(blocks), Tile::kThreads, Tile::kBytes, queue>>>(task);
  check_cuda(cudaGetLastError(), "ghost_norms_");
  add_norms(task.norms, shape.samples, shape.groups * task.pairs * Tile::kWarps, scale, norms,
            queue);
}

constexpr int kPairThreads = 256;

template <class T>
struct PairTask {
  const T *output_grad, *input;
  Offsets offsets;
  int64_t grad_sample, grad_channel, input_sample, input_channel;  // distances
  int64_t groups, outputs, channels, inputs, pairs;
  double* norms;  // [samples, groups, pairs]
};

template <class T>
__global__ void __launch_bounds__(kPairThreads) pair_kernel(PairTask<T> task) {
  const Pair pair = pair_of(blockIdx.x % task.pairs);
  const int64_t group = blockIdx.x / task.pairs % task.groups;
  const int64_t sample = blockIdx.x / task.pairs / task.groups;
  const T* const e =
      task.output_grad + sample * task.grad_sample + group * task.outputs * task.grad_channel;
  const T* const x =
      task.input + sample * task.input_sample + group * task.channels * task.input_channel;
  const T* const e_row = e + task.offsets.grad_positions[pair.row];
  const T* const e_col = e + task.offsets.grad_positions[pair.col];
  const T* const x_row = x + task.offsets.input_positions[pair.row];
  const T* const x_col = x + task.offsets.input_positions[pair.col];
  float grad = 0.0f, input = 0.0f;
  for (int64_t o = threadIdx.x; o < task.outputs; o += kPairThreads) {
    grad += to_float(e_row[o * task.grad_channel]) * to_float(e_col[o * task.grad_channel]);
  }
  for (int64_t i = threadIdx.x; i < task.inputs; i += kPairThreads) {
    const int64_t offset = task.offsets.inputs[i];
    input += to_float(x_row[offset]) * to_float(x_col[offset]);
  }
  const double grads = block_sum<kPairThreads>(static_cast<double>(grad));
  const double inputs = block_sum<kPairThreads>(static_cast<double>(input));
  if (threadIdx.x == 0) {
    task.norms[blockIdx.x] = grads * inputs * (pair.row == pair.col ? 1.0 : 2.0);
  }
}

template <class T>
void ghost_pairs(const WeightGradShape& shape, const T* output_grad, const T* input, double scale,
                 double* norms, const Scratch& scratch, cudaStream_t queue) {
  PairTask<T> task{};
  task.output_grad = output_grad;
  task.input = input;
  task.offsets = make_offsets(shape, scratch, queue);
  task.grad_sample = shape.images * shape.grad_strides[0];
  task.grad_channel = shape.grad_strides[1];
  task.input_sample = shape.images * shape.input_strides[0];
  task.input_channel = shape.input_strides[1];
  task.groups = shape.groups;
  task.outputs = shape.outputs;
  task.channels = shape.channels;
  task.inputs = shape.inputs();
  task.pairs = pairs(shape.images * shape.positions());
  const int64_t blocks = shape.samples * shape.groups * task.pairs;
  task.norms = allocate<double>(scratch, blocks);
  pair_kernel<<<grid_size(blocks), kPairThreads, 0, queue>>>(task);
  check_cuda(cudaGetLastError(), "ghost_norms_");
  add_norms(task.norms, shape.samples, shape.groups * task.pairs, scale, norms, queue);
}

template <class T>
struct Tiles {
  using Small = TensorTile<T, 1, 2, false>;
  using Large = TensorTile<T, 2, 4, false>;
};
template <>
struct Tiles<float> {
  using Small = FloatTile<64, false>;
  using Large = FloatTile<64, false>;
};

}  // namespace

template <class T>
void ghost_norms_cuda(const WeightGradShape& shape, const T* output_grad, const T* input,
                      double scale, double* norms, const Scratch& scratch, int device,
                      void* stream) {
  constexpr int64_t kFewPositions = 8, kSomePositions = 512;
  if (is_empty(shape)) return;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const int64_t positions = shape.images * shape.positions();
  if (positions <= kFewPositions) {
    ghost_pairs(shape, output_grad, input, scale, norms, scratch, queue);
  } else if (positions < kSomePositions) {
    ghost_tiles<typename Tiles<T>::Small>(shape, output_grad, input, scale, norms, scratch, queue);
  } else {
    ghost_tiles<typename Tiles<T>::Large>(shape, output_grad, input, scale, norms, scratch, queue);
  }
}

#define INSTANTIATE(T)                                                                        \
  template void ghost_norms_cuda(const WeightGradShape&, const T*, const T*, double, double*, \
                                 const Scratch&, int, void*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
