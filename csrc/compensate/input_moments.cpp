// second += Σ a aᵀ and cross += Σ y aᵀ on the CPU: a blocked matrix product over tiles of positions
// whose patches are unfolded into the cache and nowhere else.
//
// Features are cut into blocks of at most kBlock, positions into chunks. A task owns one chunk of
// one block of a result: a block of `second` on or above the diagonal, or a block of `cross`. Where
// the outputs are few, the task of a diagonal block computes the block of `cross` too, from the
// same patches. It goes through its chunk in tiles of kTile positions: unfolds them into panels of
// one vector of features, multiplies, with products kept in registers over the tile, and adds to
// its own float64 sums, which are added to the result at the end, chunk after chunk. So the order
// of every sum is fixed, whatever the number of threads. Layers of few inputs and outputs, such as
// depthwise ones, are multiplied without panels (accumulate_small). Bound: K (K + 1) / 2 + O K
// multiply-adds a position.
#include "compensate/input_moments.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "compensate/input_patches.h"
#include "compensate/input_products.h"

namespace fitcompress {
namespace {

constexpr int64_t kBlock = 288;      // features of a block
constexpr int64_t kTasks = 64;       // positions are cut in chunks to have that many
constexpr int64_t kMinChunk = 2048;  // but not below that
constexpr int64_t kSmall = 32;       // up to that many features are multiplied as rows

constexpr int64_t kStageRows = 2 * kSmall + kStrip - 1;
constexpr int64_t kSmallTotals =
    round_up(2 * kSmall, kStrip) * round_up(kSmall, kStrip) * kMaxLanes + 2 * kSmall;

// What one task works with. All buffers are aligned to a vector.
struct Scratch {
  Run* runs;       // [kTile]
  float* stage;    // [kStageRows, kRowStride]
  float* columns;  // panels of the block's columns
  float* rows;     // panels of its rows, off the diagonal; or of the outputs
  double* total;   // [rows, columns] of the block
  double* cross;   // [outputs, columns]
  double* sums;    // of the columns
  double* output_sums;
  double* small;  // of accumulate_small
};

struct Problem {
  int64_t groups;
  Matrix input;
  const Matrix* output;  // may be null
  double* second;
  double* cross;

  int64_t inputs, outputs;      // K, O
  int64_t block, output_block;  // features of a block
  int64_t blocks;               // blocks of K
  int64_t tasks_per_chunk;      // of one group
  int64_t chunk, chunks;        // positions of a chunk
  bool shared;                  // diagonal tasks compute blocks of cross

  Problem(int64_t groups, const StridedMatrix& input, const Matrix* output, double* second,
          double* cross)
      : groups(groups), input(input), output(output), second(second), cross(cross) {
    inputs = this->input.features;
    outputs = output == nullptr ? 0 : output->features;
    // At least one block: without inputs there still are sums of outputs.
    blocks = std::max<int64_t>(1, ceil_div(inputs, kBlock));
    block = round_up(ceil_div(inputs, blocks), kMaxLanes);
    if (block > 0) blocks = std::max<int64_t>(1, ceil_div(inputs, block));
    shared = outputs > 0 && outputs <= kBlock;
    const int64_t output_blocks = std::max<int64_t>(1, ceil_div(outputs, kBlock));
    output_block = round_up(ceil_div(outputs, output_blocks), kMaxLanes);
    tasks_per_chunk = blocks * (blocks + 1) / 2;
    if (outputs > kBlock) tasks_per_chunk += ceil_div(outputs, output_block) * blocks;
    const int64_t wanted = ceil_div(kTasks, groups * tasks_per_chunk);
    chunk = std::max(kMinChunk, round_up(ceil_div(this->input.count, wanted), kTile));
    chunks = ceil_div(this->input.count, chunk);
  }
};

// One block of a result. `outputs`: rows are features of `output`, else of `input`.
struct Block {
  int64_t group, first_row, height, first_column, width;
  bool diagonal, outputs;
};

Block block_of(const Problem& problem, int64_t task) {
  Block block{};
  block.group = task / problem.tasks_per_chunk;
  int64_t index = task % problem.tasks_per_chunk, row = 0;
  const int64_t pairs = problem.blocks * (problem.blocks + 1) / 2;
  block.outputs = index >= pairs;
  if (block.outputs) {
    index -= pairs;
    row = index / problem.blocks;
    index %= problem.blocks;
  } else {
    while (index >= problem.blocks - row) index -= problem.blocks - row++;
    index += row;
    block.diagonal = index == row;
  }
  const int64_t size = block.outputs ? problem.output_block : problem.block;
  block.first_row = row * size;
  block.height = std::min(size, (block.outputs ? problem.outputs : problem.inputs) - row * size);
  block.first_column = index * problem.block;
  block.width = std::min(problem.block, problem.inputs - block.first_column);
  return block;
}

// The sums of one block over one chunk.
template <int Lanes>
FITCOMPRESS_INLINE void accumulate(const Problem& problem, const Block& block, int64_t chunk,
                                   const Scratch& scratch) {
  const int64_t stride = round_up(block.width, Lanes);
  const bool with_outputs = block.outputs || (problem.shared && block.diagonal);
  const int64_t output_first = block.outputs ? block.first_row : 0;
  const int64_t output_height = block.outputs ? block.height : problem.outputs;
  const auto clear = [](double* data, int64_t count) __attribute__((always_inline)) {
    std::memset(data, 0, static_cast<size_t>(count) * sizeof(double));
  };
  if (!block.outputs) clear(scratch.total, round_up(block.height, kMaxLanes) * stride);
  clear(scratch.sums, stride);
  if (with_outputs) {
    clear(scratch.cross, round_up(output_height, kMaxLanes) * stride);
    clear(scratch.output_sums, round_up(output_height, kMaxLanes));
  }

  const int64_t end = std::min((chunk + 1) * problem.chunk, problem.input.count);
  for (int64_t begin = chunk * problem.chunk; begin < end; begin += kTile) {
    const int64_t length = std::min(kTile, end - begin);
    unfold<Lanes>(problem.input, block.group, block.first_column, block.width, begin, length,
                  scratch.runs, scratch.stage, scratch.columns);
    if (block.diagonal) {
      add_sums<Lanes>(scratch.columns, block.width, length, scratch.sums);
      multiply<Lanes>(scratch.columns, block.height, scratch.columns, block.width, true, length,
                      scratch.total);
    }
    if (block.diagonal && !with_outputs) continue;
    const int64_t first = with_outputs ? output_first : block.first_row;
    const int64_t height = with_outputs ? output_height : block.height;
    unfold<Lanes>(with_outputs ? *problem.output : problem.input, block.group, first, height, begin,
                  length, scratch.runs, scratch.stage, scratch.rows);
    if (with_outputs && block.first_column == 0) {
      add_sums<Lanes>(scratch.rows, height, length, scratch.output_sums);
    }
    multiply<Lanes>(scratch.rows, height, scratch.columns, block.width, false, length,
                    with_outputs ? scratch.cross : scratch.total);
  }
}

// The same for a block that is all of the inputs and outputs of a group, and these are few: the
// rows of both, one after the other, times those of the inputs.
template <int Lanes>
FITCOMPRESS_INLINE void accumulate_small(const Problem& problem, const Block& block, int64_t chunk,
                                         const Scratch& scratch) {
  const int64_t inputs = problem.inputs, outputs = problem.outputs, all = inputs + outputs;
  const int64_t stride = round_up(inputs, Lanes);
  const int64_t strips = ceil_div(all, kStrip), column_strips = ceil_div(inputs, kStrip);
  constexpr int64_t kElements = kStrip * kStrip * Lanes;
  double* const products = scratch.small;  // [strips, column_strips, kStrip, kStrip, Lanes]
  double* const sums = products + strips * column_strips * kElements;
  std::memset(products, 0,
              static_cast<size_t>(strips * column_strips * kElements + all) * sizeof(double));
  std::memset(scratch.stage + all * kRowStride, 0, (kStrip - 1) * kRowStride * sizeof(float));

  const int64_t end = std::min((chunk + 1) * problem.chunk, problem.input.count);
  for (int64_t begin = chunk * problem.chunk; begin < end; begin += kTile) {
    const int64_t length = std::min(kTile, end - begin), vectors = ceil_div(length, Lanes);
    unfold_rows<Lanes>(problem.input, block.group, begin, length, scratch.runs, scratch.stage);
    if (outputs > 0) {
      unfold_rows<Lanes>(*problem.output, block.group, begin, length, scratch.runs,
                         scratch.stage + inputs * kRowStride);
    }
    for (int64_t r = 0; r < strips; ++r) {
      for (int64_t c = 0; c < column_strips; ++c) {
        if (c < r && (r + 1) * kStrip <= inputs) continue;  // below the diagonal
        multiply_strips<Lanes>(scratch.stage + r * kStrip * kRowStride,
                               scratch.stage + c * kStrip * kRowStride, vectors,
                               products + (r * column_strips + c) * kElements);
      }
    }
    for (int64_t f = 0; f < all; ++f) {
      using Vector = typename VectorOf<Lanes>::Type;
      const auto* const row = reinterpret_cast<const Vector*>(scratch.stage + f * kRowStride);
      Vector sum{};
      for (int64_t v = 0; v < vectors; ++v) sum += row[v];
      float total = 0.0f;
      for (int l = 0; l < Lanes; ++l) total += sum[l];
      sums[f] += total;
    }
  }

  for (int64_t r = 0; r < all; ++r) {
    double* const to =
        r < inputs ? scratch.total + r * stride : scratch.cross + (r - inputs) * stride;
    for (int64_t c = r < inputs ? r : 0; c < inputs; ++c) {
      const double* const from = products + (r / kStrip * column_strips + c / kStrip) * kElements +
                                 (r % kStrip * kStrip + c % kStrip) * Lanes;
      to[c] = 0.0;
      for (int l = 0; l < Lanes; ++l) to[c] += from[l];
    }
    (r < inputs ? scratch.sums[r] : scratch.output_sums[r - inputs]) = sums[r];
  }
}

// Adds the sums of one block to the results, those of `second` on both sides of the diagonal.
void add_to_results(const Problem& problem, const Block& block, int64_t stride,
                    const Scratch& scratch) {
  const int64_t inputs = problem.inputs, size = inputs + 1;
  if (!block.outputs) {
    double* const second = problem.second + block.group * size * size;
    for (int64_t r = 0; r < block.height; ++r) {
      double* const to = second + (block.first_row + r) * size + block.first_column;
      const double* const from = scratch.total + r * stride;
      for (int64_t c = block.diagonal ? r : 0; c < block.width; ++c) to[c] += from[c];
    }
    constexpr int64_t kSide = 8;  // rows of the transposed block, written side by side
    for (int64_t strip = 0; strip < block.width; strip += kSide) {
      const int64_t end = std::min(strip + kSide, block.width);
      for (int64_t r = 0; r < block.height; ++r) {
        double* const to = second + block.first_column * size + block.first_row + r;
        const double* const from = scratch.total + r * stride;
        for (int64_t c = block.diagonal ? std::max(strip, r + 1) : strip; c < end; ++c) {
          to[c * size] += from[c];
        }
      }
    }
    if (block.diagonal) {
      for (int64_t c = 0; c < block.width; ++c) {
        second[(block.first_column + c) * size + inputs] += scratch.sums[c];
        second[inputs * size + block.first_column + c] += scratch.sums[c];
      }
    }
  }
  if (!block.outputs && !(problem.shared && block.diagonal)) return;
  const int64_t first = block.outputs ? block.first_row : 0;
  const int64_t height = block.outputs ? block.height : problem.outputs;
  for (int64_t r = 0; r < height; ++r) {
    double* const to = problem.cross + (block.group * problem.outputs + first + r) * size;
    const double* const from = scratch.cross + r * stride;
    for (int64_t c = 0; c < block.width; ++c) to[block.first_column + c] += from[c];
    if (block.first_column == 0) to[inputs] += scratch.output_sums[r];
  }
}

// Takes one task after another until none is left. The chunks of a block are added in their order:
// who is done early waits for the chunk before, which is being worked on, as tasks are taken in
// order.
template <int Lanes>
FITCOMPRESS_INLINE void work(const Problem& problem, const Scratch& scratch,
                             std::atomic<int64_t>* next, std::atomic<int64_t>* added) {
  const int64_t blocks = problem.groups * problem.tasks_per_chunk;
  const bool small = problem.inputs <= kSmall && problem.outputs <= kSmall;
  for (int64_t task = (*next)++; task < blocks * problem.chunks; task = (*next)++) {
    const Block block = block_of(problem, task % blocks);
    const int64_t chunk = task / blocks;
    if (small) {
      accumulate_small<Lanes>(problem, block, chunk, scratch);
    } else {
      accumulate<Lanes>(problem, block, chunk, scratch);
    }
    std::atomic<int64_t>& done = added[task % blocks];
    while (done.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
    add_to_results(problem, block, round_up(block.width, Lanes), scratch);
    done.store(chunk + 1, std::memory_order_release);
  }
}

}  // namespace

void input_moments_cpu(int64_t groups, const StridedMatrix& input, const StridedMatrix* output,
                       double* second, double* cross) {
  std::vector<Matrix> outputs;
  if (output != nullptr) outputs.emplace_back(*output);
  const Problem problem(groups, input, output == nullptr ? nullptr : outputs.data(), second, cross);
  if (problem.input.count == 0) return;
  const int64_t size = problem.inputs + 1;
  for (int64_t g = 0; g < groups; ++g) {
    second[(g + 1) * size * size - 1] += static_cast<double>(problem.input.count);
  }

  const int64_t columns = problem.block;
  const int64_t rows = std::max(columns, problem.output_block);
  const int64_t shared = round_up(problem.outputs, kMaxLanes);
  const int64_t crossed = problem.outputs > kBlock ? problem.output_block : shared;
  const int64_t blocks = groups * problem.tasks_per_chunk;
  std::vector<std::atomic<int64_t>> added(static_cast<size_t>(blocks));
  for (auto& each : added) each = 0;
  std::atomic<int64_t> next{0};
  parallel_for(blocks * problem.chunks, 1, [&](int64_t, int64_t) {
    try {
      const auto runs = make_buffer<Run>(kTile);
      const auto floats =
          make_buffer<float>(kStageRows * kRowStride + (rows + columns) * (kTile + 1));
      const auto doubles =
          make_buffer<double>((columns + crossed) * columns + columns + rows + kSmallTotals);
      Scratch scratch{};
      scratch.runs = runs.get();
      scratch.stage = floats.get();
      scratch.columns = scratch.stage + kStageRows * kRowStride;
      scratch.rows = scratch.columns + columns * (kTile + 1);
      scratch.total = doubles.get();
      scratch.cross = scratch.total + columns * columns;
      scratch.sums = scratch.cross + crossed * columns;
      scratch.output_sums = scratch.sums + columns;
      scratch.small = scratch.output_sums + rows;
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        work<lanes>(problem, scratch, &next, added.data());
      });
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < blocks * problem.chunks) throw std::bad_alloc();
}

}  // namespace fitcompress
