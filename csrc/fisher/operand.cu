// Operands of the Fisher kernels on CUDA: copies with channels last, and tables of offsets.
//
// The copy reads and writes a tensor once, which is little beside the products that follow: bound
// by memory. A block moves 64 positions × 64 channels through shared memory, so that both sides are
// read and written in runs.
#include "fisher/operand.cuh"

namespace fitcompress {
namespace {

constexpr int kTile = 64;
constexpr int kCopyThreads = 256;
constexpr int kTableThreads = 256;

// offset(j) = Σ digit · step over the digits of j, the last size the fastest.
template <class Offset>
struct Table {
  int64_t sizes[4], steps[4];
  Offset* offsets;

  int64_t count() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};
template <class Offset>
struct Tables {
  Table<Offset> table[4];
};

template <class Offset>
__global__ void offsets_kernel(Tables<Offset> tables) {
  const Table<Offset>& table = tables.table[blockIdx.y];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  int64_t rest = j, offset = 0;
  for (int i = 3; i >= 0; --i) {
    offset += rest % table.sizes[i] * table.steps[i];
    rest /= table.sizes[i];
  }
  if (rest == 0) table.offsets[j] = static_cast<Offset>(offset);
}

template <class Offset>
void fill(const Tables<Offset>& tables, unsigned number, cudaStream_t queue) {
  int64_t most = 1;
  for (unsigned i = 0; i < number; ++i) most = std::max(most, tables.table[i].count());
  const dim3 blocks(grid_size(divide_up(most, kTableThreads)), number);
  offsets_kernel<<<blocks, kTableThreads, 0, queue>>>(tables);
  check_cuda(cudaGetLastError(), "offsets");
}

// Strides of image, channel, depth, height, width.
using Strides = std::array<int64_t, 5>;

// Offsets of the positions of a sample, in units of `unit` elements.
template <class Offset>
Table<Offset> positions_table(const WeightGradShape& shape, const Strides& strides,
                              const std::array<int64_t, 3>& step, int64_t unit,
                              const Scratch& scratch) {
  const auto& p = shape.places;
  return {{shape.images, p[0], p[1], p[2]},
          {strides[0] / unit, step[0] * strides[2] / unit, step[1] * strides[3] / unit,
           step[2] * strides[4] / unit},
          allocate<Offset>(scratch, shape.images * shape.positions())};
}

constexpr std::array<int64_t, 3> kOnes = {1, 1, 1};

struct CopyTask {
  int64_t strides[5];
  int64_t groups, channels, padded;
  int64_t height, width, positions;
  int64_t position_tiles, channel_tiles;
};

// [image, group · channels, positions] with any strides to [image, group, positions, padded].
template <class Bits>
__global__ void __launch_bounds__(kCopyThreads)
    channels_last_kernel(CopyTask task, const Bits* from, Bits* to) {
  // Rows that differ by one word modulo the banks.
  __shared__ Bits tile[kTile][kTile + 4 / sizeof(Bits)];
  int64_t block = blockIdx.x;
  const int64_t first_channel = block % task.channel_tiles * kTile;
  block /= task.channel_tiles;
  const int64_t first_position = block % task.position_tiles * kTile;
  block /= task.position_tiles;
  const int64_t image = block / task.groups, group = block % task.groups;
  const int thread = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(min(task.padded - first_channel, static_cast<int64_t>(kTile)));

  const int x = thread % kTile;
  const int64_t position = first_position + x;
  const int64_t w = position % task.width, row = position / task.width;
  const int64_t h = row % task.height, d = row / task.height;
  const Bits* const source = from + image * task.strides[0] +
                             (group * task.channels + first_channel) * task.strides[1] +
                             d * task.strides[2] + h * task.strides[3] + w * task.strides[4];
  for (int c = thread / kTile; c < width; c += kCopyThreads / kTile) {
    const bool inside = position < task.positions && first_channel + c < task.channels;
    tile[c][x] = inside ? source[c * task.strides[1]] : Bits(0);
  }
  __syncthreads();
  Bits* const target =
      to + ((image * task.groups + group) * task.positions + first_position) * task.padded +
      first_channel;
  for (int i = thread; i < kTile * width; i += kCopyThreads) {
    const int p = i / width, c = i % width;
    if (first_position + p < task.positions) target[p * task.padded + c] = tile[c][p];
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
  channels_last_kernel<<<grid_size(blocks), kCopyThreads, 0, queue>>>(
      task, reinterpret_cast<const Bits*>(data), reinterpret_cast<Bits*>(copy));
  check_cuda(cudaGetLastError(), "channels_last");
  const int64_t group = task.positions * task.padded, row = space[2] * task.padded;
  return {copy, {shape.groups * group, 1, space[1] * row, row, task.padded}, group, task.padded};
}

// The largest offset within a sample, in chunks, must fit into the tables: 16 GiB.
template <class T>
void require_small_sample(const WeightGradShape& shape, const ChannelsLast<T>& view,
                          const std::array<int64_t, 3>& space) {
  int64_t last = (shape.images - 1) * view.strides[0] + view.padded;
  for (size_t i = 0; i < 3; ++i) last += (space[i] - 1) * view.strides[i + 2];
  if (last / kChunk<T> >= -int64_t{kOutside})
    throw std::runtime_error("CUDA: a sample is too large");
}

}  // namespace

template <class T>
Operands<T> make_operands(const WeightGradShape& shape, const T* output_grad, const T* input,
                          const Scratch& scratch, cudaStream_t queue) {
  constexpr int64_t kUnit = kChunk<T>;
  const ChannelsLast<T> e = channels_last(shape, output_grad, shape.grad_strides, shape.outputs,
                                          shape.places, scratch, queue);
  const ChannelsLast<T> x =
      channels_last(shape, input, shape.input_strides, shape.channels, shape.space, scratch, queue);
  require_small_sample(shape, e, shape.places);
  require_small_sample(shape, x, shape.space);
  const auto &k = shape.kernel, &d = shape.dilation;
  const Strides& u = x.strides;
  const int64_t outputs = e.padded / kUnit, channels = x.padded / kUnit;
  const int64_t inputs = shape.kernel_volume() * channels;
  Tables<int32_t> tables{};
  auto& t = tables.table;
  t[0] = positions_table<int32_t>(shape, e.strides, kOnes, kUnit, scratch);
  t[1] = positions_table<int32_t>(shape, u, shape.stride, kUnit, scratch);
  t[2] = {{1, 1, 1, outputs}, {0, 0, 0, 1}, allocate<int32_t>(scratch, outputs)};
  t[3] = {{k[0], k[1], k[2], channels},
          {d[0] * u[2] / kUnit, d[1] * u[3] / kUnit, d[2] * u[4] / kUnit, 1},
          allocate<int32_t>(scratch, inputs)};
  fill(tables, 4, queue);
  const int64_t positions = shape.images * shape.positions();
  if (std::max({positions, inputs * kUnit, e.padded}) >= -int64_t{kOutside}) {
    throw std::runtime_error("CUDA: a sample has too many positions or columns");
  }
  return {{e.data, shape.images * e.strides[0], e.group, t[0].offsets, t[2].offsets,
           static_cast<int>(e.padded)},
          {x.data, shape.images * u[0], x.group, t[1].offsets, t[3].offsets,
           static_cast<int>(inputs * kUnit)},
          static_cast<int>(positions),
          static_cast<int>(x.padded)};
}

Offsets make_offsets(const WeightGradShape& shape, const Scratch& scratch, cudaStream_t queue) {
  const auto &k = shape.kernel, &d = shape.dilation;
  const Strides& u = shape.input_strides;
  Tables<int64_t> tables{};
  auto& t = tables.table;
  t[0] = positions_table<int64_t>(shape, shape.grad_strides, kOnes, 1, scratch);
  t[1] = positions_table<int64_t>(shape, u, shape.stride, 1, scratch);
  t[2] = {{shape.channels, k[0], k[1], k[2]},
          {u[1], d[0] * u[2], d[1] * u[3], d[2] * u[4]},
          allocate<int64_t>(scratch, shape.inputs())};
  fill(tables, 3, queue);
  return {t[0].offsets, t[1].offsets, t[2].offsets};
}

#define INSTANTIATE(T)                                                                           \
  template Operands<T> make_operands(const WeightGradShape&, const T*, const T*, const Scratch&, \
                                     cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
