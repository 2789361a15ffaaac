// Sums of squared per-sample weight gradients on CUDA: a tiled matrix product over the positions of
// a sample whose epilogue squares and adds.
//
// A block owns a tile of the moment for a slice of the samples: 64 × 64 to 128 × 128 elements, 8 ×
// 8 a thread, which it runs through the positions of all its samples without a pause (tile.cuh).
// The squares of a few samples are summed in registers. No element of a slice is touched by two
// blocks and slices are added in order: no atomics, one fixed order. Read: the gradient once per
// column of tiles, the input once per row of them, both mostly from the cache. Bound: B·P·O·I
// multiply-adds, of float32 on the ordinary cores, of 16-bit types on the tensor cores.
//
// Groups of very few weights, those of depthwise convolutions, would leave tiles empty: they have a
// kernel of their own (square_few.cuh). A single position would leave the steps of the product
// empty: there the product runs over the samples (single_position.cuh).
#include "fisher/ghost_norms.h"
#include "fisher/partial_sums.cuh"
#include "fisher/single_position.cuh"
#include "fisher/square_accumulate.h"
#include "fisher/square_few.cuh"
#include "fisher/tile.cuh"

namespace fitcompress {
namespace {

template <class T>
struct SquareTask {
  Operands<T> of;
  bool squares;            // of the operands are squares already, not of the product
  int samples_in_float;    // whose squares are summed in float32
  int64_t samples, slice;  // slice: samples of a block
  int64_t groups, outputs, channels, kernel_volume;
  int64_t row_tiles, col_tiles;
  MomentSink moment;
  double* norms;  // [samples, groups, tiles, warps]; null: not needed
};

// The tile that a block owns.
struct Place {
  int64_t tile;  // among those of all groups
  int64_t group, row, col, slice;
};

template <class Tile>
__device__ Place place_of_block(const SquareTask<typename Tile::T>& task) {
  const int64_t tiles = task.row_tiles * task.col_tiles;
  const int64_t tile = blockIdx.x % (task.groups * tiles);
  return {tile, tile / tiles, tile % tiles / task.col_tiles * Tile::kRows,
          tile % task.col_tiles * Tile::kCols, blockIdx.x / (task.groups * tiles)};
}

__device__ double squared_norm(const float (&sum)[kSide][kSide]) {
  float parts[kSide] = {};
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) parts[i] += sum[i][j] * sum[i][j];
  }
  double norm = 0.0;
#pragma unroll
  for (int i = 0; i < kSide; ++i) norm += parts[i];
  return norm;
}

// total += sum ∘ sum, or sum alone.
__device__ void add_squares(const float (&sum)[kSide][kSide], bool squares,
                            float (&total)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) total[i][j] += sum[i][j] * (squares ? 1.0f : sum[i][j]);
  }
}

__device__ void clear(float (&sum)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) sum[i][j] = 0.0f;
  }
}

template <class Tile>
__device__ void add_to_moment(const SquareTask<typename Tile::T>& task, const Place& place,
                              const float (&total)[kSide][kSide], bool first) {
  // A copy that lies in memory, since a loop indexes it: unrolled, this rare step would need more
  // registers than the products.
  float values[kSide][kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) values[i][j] = total[i][j];
  }
#pragma unroll 1
  for (int j = 0; j < kSide; ++j) {
    const int64_t column = place.col + Tile::col(j);
    const int64_t channel = column % task.of.padded_channels;
    const int64_t k = column / task.of.padded_channels;
    if (channel >= task.channels || k >= task.kernel_volume) continue;
#pragma unroll 1
    for (int i = 0; i < kSide; ++i) {
      const int64_t output = place.row + Tile::row(i);
      if (output >= task.outputs) break;
      const int64_t row = place.group * task.outputs + output;
      task.moment.add(place.slice, (row * task.channels + channel) * task.kernel_volume + k,
                      values[i][j], first);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    square_kernel(SquareTask<typename Tile::T> task) {
  using T = typename Tile::T;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const memory = reinterpret_cast<T*>(shared);
  const Place place = place_of_block<Tile>(task);
  const Operand<T>&grad = task.of.grad, &input = task.of.input;
  int64_t sample = place.slice * task.slice;
  const int64_t last = min(sample + task.slice, task.samples);
  const int positions = task.of.positions;

  const T* e = grad.data + sample * grad.sample + place.group * grad.group;
  const T* x = input.data + sample * input.sample + place.group * input.group;
  typename Tile::Left left;
  typename Tile::Right right;
  left.look_up_columns(grad, static_cast<int>(place.row));
  right.look_up_columns(input, static_cast<int>(place.col));
  left.look_up_positions(grad, 0, positions);
  right.look_up_positions(input, 0, positions);
  int to_copy = 0;  // first position of the next copy
  const auto copy = [&](int stage, bool wanted) {
    left.start(e, Tile::left(memory, stage), wanted);
    right.start(x, Tile::right(memory, stage), wanted);
    to_copy += Tile::kDepth;
    if (to_copy >= positions) {
      to_copy = 0;
      e += grad.sample;
      x += input.sample;
    }
    left.look_up_positions(grad, to_copy, positions);
    right.look_up_positions(input, to_copy, positions);
  };

  float sum[kSide][kSide] = {}, total[kSide][kSide] = {};
  int to_do = positions, samples_in_total = 0;
  bool first = true;
  const auto use = [&](int stage, auto&& meanwhile) {
    Tile::multiply(Tile::left(memory, stage), Tile::right(memory, stage), to_do, sum, meanwhile);
    to_do -= Tile::kDepth;
    if (to_do > 0) return;
    to_do = positions;
    if (task.norms != nullptr) {
      const int64_t tiles = task.groups * task.row_tiles * task.col_tiles;
      const double norm = warp_sum(squared_norm(sum));
      const int64_t part = (sample * tiles + place.tile) * Tile::kWarps + threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) task.norms[part] = norm;
    }
    ++sample;
    if (task.moment.wanted()) {
      add_squares(sum, task.squares, total);
      if (++samples_in_total == task.samples_in_float || sample == last) {
        add_to_moment<Tile>(task, place, total, first);
        clear(total);
        samples_in_total = 0;
        first = false;
      }
    }
    clear(sum);
  };
  const int steps = (positions + Tile::kDepth - 1) / Tile::kDepth;
  run_pipeline((last - sample) * steps, copy, use);
}

template <class Tile, class Moment>
void square_tiles(const WeightGradShape& shape, const typename Tile::T* output_grad,
                  const typename Tile::T* input, bool squares, double scale, Moment* moment,
                  double* norms, const Scratch& scratch, cudaStream_t queue) {
  using T = typename Tile::T;
  constexpr int64_t kElements = 1 << 22;     // of tiles in work, to fill a device
  constexpr int64_t kFewestPositions = 512;  // of a slice, whose moment must be written and read
  SquareTask<T> task{};
  task.of = make_operands(shape, output_grad, input, scratch, queue);
  task.squares = squares;
  task.samples_in_float = squares ? 1 : 16;
  task.samples = shape.samples;
  task.groups = shape.groups;
  task.outputs = shape.outputs;
  task.channels = shape.channels;
  task.kernel_volume = shape.kernel_volume();
  task.row_tiles = divide_up(shape.outputs, Tile::kRows);
  task.col_tiles = divide_up(task.of.input.width, Tile::kCols);
  const int64_t tiles = shape.groups * task.row_tiles * task.col_tiles;
  const Slices slices =
      cut_samples(shape.samples, divide_up(kElements / (Tile::kRows * Tile::kCols), tiles),
                  moment == nullptr ? 1 : divide_up(kFewestPositions, task.of.positions));
  task.slice = slices.length;
  const int64_t size = shape.groups * shape.outputs * shape.inputs();
  task.moment = make_sink(moment, slices.count, size, scale, scratch);
  const int64_t parts = tiles * Tile::kWarps;
  if (norms != nullptr) task.norms = allocate<double>(scratch, shape.samples * parts);

  check_cuda(cudaFuncSetAttribute(square_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Tile::kBytes),
             "square_accumulate_");
  const unsigned blocks = grid_size(tiles * slices.count);
  square_kernel<Tile><<<blocks, Tile::kThreads, Tile::kBytes, queue>>>(task);
  check_cuda(cudaGetLastError(), "square_accumulate_");
  if (task.moment.slice > 0) {
    add_moments(task.moment.twice, slices.count, size, scale, moment, queue);
  }
  if (norms != nullptr) add_norms(task.norms, shape.samples, parts, scale, norms, queue);
}

template <class T>
struct Tiles {
  using Small = TensorTile<T, 1, 2, true>;
  using Large = TensorTile<T, 2, 4, true>;
};
template <>
struct Tiles<float> {
  using Small = FloatTile<64, true>;
  using Large = FloatTile<128, true>;
};

// Large tiles need fewer reads; small ones waste less at the edges and make more blocks.
template <class T>
bool prefers_large_tiles(const WeightGradShape& shape) {
  constexpr int64_t kFewestBlocks = 128;
  using Small = typename Tiles<T>::Small;
  using Large = typename Tiles<T>::Large;
  const auto tiles = [&](int64_t rows, int64_t cols) {
    return divide_up(shape.outputs, rows) * divide_up(shape.inputs(), cols);
  };
  const int64_t large = tiles(Large::kRows, Large::kCols);
  const int64_t small = tiles(Small::kRows, Small::kCols);
  return large * shape.groups * shape.samples >= kFewestBlocks &&
         large * Large::kRows * Large::kCols * 5 <= small * Small::kRows * Small::kCols * 6;
}

template <class T, class Moment>
void square_any_tiles(const WeightGradShape& shape, const T* output_grad, const T* input,
                      bool squares, double scale, Moment* moment, double* norms,
                      const Scratch& scratch, cudaStream_t queue) {
  if (prefers_large_tiles<T>(shape)) {
    square_tiles<typename Tiles<T>::Large>(shape, output_grad, input, squares, scale, moment, norms,
                                           scratch, queue);
  } else {
    square_tiles<typename Tiles<T>::Small>(shape, output_grad, input, squares, scale, moment, norms,
                                           scratch, queue);
  }
}

}  // namespace

template <class T, class Moment>
void square_accumulate_cuda(const WeightGradShape& shape, const T* output_grad, const T* input,
                            double scale, Moment* moment, double* norms, const Scratch& scratch,
                            int device, void* stream) {
  constexpr int64_t kFewWeights = 16;
  if (is_empty(shape) || (moment == nullptr && norms == nullptr)) return;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  if (shape.outputs * shape.channels <= kFewWeights) {
    square_few(shape, output_grad, input, scale, moment, norms, scratch, queue);
  } else if (has_single_position(shape)) {
    if (norms != nullptr) {
      ghost_norms_cuda(shape, output_grad, input, scale, norms, scratch, device, stream);
    }
    if (moment == nullptr) return;
    const Squares squares = make_squares(shape, output_grad, input, scratch, queue);
    double* const no_norms = nullptr;
    square_any_tiles(squares.shape, squares.output_grad, squares.input, true, scale, moment,
                     no_norms, scratch, queue);
  } else {
    square_any_tiles(shape, output_grad, input, false, scale, moment, norms, scratch, queue);
  }
}

#define INSTANTIATE(T, Moment)                                                             \
  template void square_accumulate_cuda(const WeightGradShape&, const T*, const T*, double, \
                                       Moment*, double*, const Scratch&, int, void*);
INSTANTIATE(float, float)
INSTANTIATE(float, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(BFloat16, double)
INSTANTIATE(Float16, float)
INSTANTIATE(Float16, double)
#undef INSTANTIATE

}  // namespace fitcompress
