// Operands of the Fisher kernels on CUDA: copies with channels last, and tables of offsets.
//
// The copy reads and writes a tensor once, which is little beside the products that follow: bound
// by memory. A block moves 32 positions × 32 channels through shared memory, so that both sides are
// read and written in runs.
#include "fisher/operand.cuh"

namespace fitcompress {
namespace {

constexpr int kTile = 32, kTileRows = 8;
constexpr int kTableThreads = 256;

// offset(j) = Σ digit · step over the digits of j, the last size the fastest.
struct Table {
  int64_t sizes[4], steps[4];
  int64_t* offsets;
};
struct Tables {
  Table table[4];
};

__global__ void offsets_kernel(Tables tables) {
  const Table& table = tables.table[blockIdx.y];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  int64_t rest = j, offset = 0;
  for (int i = 3; i >= 0; --i) {
    offset += rest % table.sizes[i] * table.steps[i];
    rest /= table.sizes[i];
  }
  if (rest == 0) table.offsets[j] = offset;
}

int64_t count(const Table& table) {
  return table.sizes[0] * table.sizes[1] * table.sizes[2] * table.sizes[3];
}

void fill(const Tables& tables, unsigned number, cudaStream_t queue) {
  int64_t most = 1;
  for (unsigned i = 0; i < number; ++i) most = std::max(most, count(tables.table[i]));
  const dim3 blocks(grid_size(divide_up(most, kTableThreads)), number);
  offsets_kernel<<<blocks, kTableThreads, 0, queue>>>(tables);
  check_cuda(cudaGetLastError(), "offsets");
}

// Strides of image, channel, depth, height, width.
using Strides = std::array<int64_t, 5>;

Table positions_table(const WeightGradShape& shape, const Strides& strides,
                      const std::array<int64_t, 3>& step, const Scratch& scratch) {
  const auto& p = shape.places;
  return {{shape.images, p[0], p[1], p[2]},
          {strides[0], step[0] * strides[2], step[1] * strides[3], step[2] * strides[4]},
          allocate<int64_t>(scratch, shape.images * shape.positions())};
}

Table grad_positions(const WeightGradShape& shape, const Strides& strides, const Scratch& scratch) {
  return positions_table(shape, strides, {1, 1, 1}, scratch);
}

Table input_positions(const WeightGradShape& shape, const Strides& strides,
                      const Scratch& scratch) {
  return positions_table(shape, strides, shape.stride, scratch);
}

struct CopyTask {
  int64_t strides[5];
  int64_t groups, channels, padded;
  int64_t height, width, positions;
  int64_t position_tiles, channel_tiles;
};

// [image, group · channels, positions] with any strides to [image, group, positions, padded].
template <class Bits>
__global__ void channels_last_kernel(CopyTask task, const Bits* from, Bits* to) {
  __shared__ Bits tile[kTile][kTile + 1];
  int64_t block = blockIdx.x;
  const int64_t first_channel = block % task.channel_tiles * kTile;
  block /= task.channel_tiles;
  const int64_t first_position = block % task.position_tiles * kTile;
  block /= task.position_tiles;
  const int64_t image = block / task.groups, group = block % task.groups;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);

  const int64_t position = first_position + x;
  const int64_t w = position % task.width, h = position / task.width % task.height;
  const int64_t d = position / task.width / task.height;
  const Bits* const source = from + image * task.strides[0] +
                             group * task.channels * task.strides[1] + d * task.strides[2] +
                             h * task.strides[3] + w * task.strides[4];
  for (int i = y; i < kTile; i += kTileRows) {
    const int64_t channel = first_channel + i;
    const bool inside = position < task.positions && channel < task.channels;
    tile[i][x] = inside ? source[channel * task.strides[1]] : Bits(0);
  }
  __syncthreads();
  Bits* const target = to + (image * task.groups + group) * task.positions * task.padded;
  for (int i = y; i < kTile; i += kTileRows) {
    const int64_t row = first_position + i, channel = first_channel + x;
    if (row < task.positions && channel < task.padded) {
      target[row * task.padded + channel] = tile[x][i];
    }
  }
}

template <class T>
struct ChannelsLast {
  const T* data;
  Strides strides;
  int64_t group, padded;
};

template <class T>
bool is_ready(const T* data, const Strides& strides, const std::array<int64_t, 5>& sizes,
              int64_t channels) {
  bool ready =
      strides[1] == 1 && channels % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const size_t i : {0, 2, 3, 4}) ready &= sizes[i] == 1 || strides[i] % kChunk<T> == 0;
  return ready;
}

template <class T>
ChannelsLast<T> channels_last(const WeightGradShape& shape, const T* data, const Strides& strides,
                              int64_t channels, const std::array<int64_t, 3>& space,
                              const Scratch& scratch, cudaStream_t queue) {
  const int64_t images = shape.samples * shape.images;
  if (is_ready(data, strides, {images, channels, space[0], space[1], space[2]}, channels)) {
    return {data, strides, channels, channels};
  }
  CopyTask task{};
  for (size_t i = 0; i < 5; ++i) task.strides[i] = strides[i];
  task.groups = shape.groups;
  task.channels = channels;
  task.padded = divide_up(channels, kChunk<T>) * kChunk<T>;
  task.height = space[1];
  task.width = space[2];
  task.positions = space[0] * space[1] * space[2];
  task.position_tiles = divide_up(task.positions, kTile);
  task.channel_tiles = divide_up(task.padded, kTile);
  const int64_t blocks = images * task.groups * task.position_tiles * task.channel_tiles;
  T* const copy = allocate<T>(scratch, images * task.groups * task.positions * task.padded);
  // Numbers are only moved: bits do.
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  channels_last_kernel<<<grid_size(blocks), dim3(kTile, kTileRows), 0, queue>>>(
      task, reinterpret_cast<const Bits*>(data), reinterpret_cast<Bits*>(copy));
  check_cuda(cudaGetLastError(), "channels_last");
  const int64_t group = task.positions * task.padded, row = space[2] * task.padded;
  return {copy, {shape.groups * group, 1, space[1] * row, row, task.padded}, group, task.padded};
}

}  // namespace

template <class T>
Operands<T> make_operands(const WeightGradShape& shape, const T* output_grad, const T* input,
                          const Scratch& scratch, cudaStream_t queue) {
  const ChannelsLast<T> e = channels_last(shape, output_grad, shape.grad_strides, shape.outputs,
                                          shape.places, scratch, queue);
  const ChannelsLast<T> x =
      channels_last(shape, input, shape.input_strides, shape.channels, shape.space, scratch, queue);
  const auto &k = shape.kernel, &d = shape.dilation;
  const int64_t outputs = e.padded / kChunk<T>, channels = x.padded / kChunk<T>;
  const int64_t inputs = shape.kernel_volume() * channels;
  Tables tables{};
  tables.table[0] = grad_positions(shape, e.strides, scratch);
  tables.table[1] = input_positions(shape, x.strides, scratch);
  tables.table[2] = {{1, 1, 1, outputs}, {0, 0, 0, kChunk<T>}, allocate<int64_t>(scratch, outputs)};
  tables.table[3] = {{k[0], k[1], k[2], channels},
                     {d[0] * x.strides[2], d[1] * x.strides[3], d[2] * x.strides[4], kChunk<T>},
                     allocate<int64_t>(scratch, inputs)};
  fill(tables, 4, queue);
  const auto& t = tables.table;
  return {{e.data, shape.images * e.strides[0], e.group, t[0].offsets, t[2].offsets, e.padded},
          {x.data, shape.images * x.strides[0], x.group, t[1].offsets, t[3].offsets,
           inputs * kChunk<T>},
          x.padded};
}

Offsets make_offsets(const WeightGradShape& shape, const Scratch& scratch, cudaStream_t queue) {
  const auto &k = shape.kernel, &d = shape.dilation;
  const Strides& u = shape.input_strides;
  Tables tables{};
  tables.table[0] = grad_positions(shape, shape.grad_strides, scratch);
  tables.table[1] = input_positions(shape, u, scratch);
  tables.table[2] = {{shape.channels, k[0], k[1], k[2]},
                     {u[1], d[0] * u[2], d[1] * u[3], d[2] * u[4]},
                     allocate<int64_t>(scratch, shape.inputs())};
  fill(tables, 3, queue);
  return {tables.table[0].offsets, tables.table[1].offsets, tables.table[2].offsets};
}

#define INSTANTIATE(T)                                                                           \
  template Operands<T> make_operands(const WeightGradShape&, const T*, const T*, const Scratch&, \
                                     cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
