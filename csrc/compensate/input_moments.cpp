// second += Σ a aᵀ and cross += Σ y aᵀ on the CPU: a blocked matrix product over tiles of positions
// whose patches are unfolded into the cache and nowhere else.
//
// Features are cut into blocks of at most kBlock, positions into chunks. A task owns one chunk of
// one block of a result: a block of `second` on or above the diagonal, or a block of `cross`. Where
// the outputs are few, the task of a diagonal block computes the block of `cross` too, from the
// same patches. It goes through its chunk in tiles of kTile positions: unfolds them into panels of
// one vector of features, multiplies, with products kept in registers over the tile, and adds to
// its own float64 sums, which are added to the result at the end, chunk after chunk. So the order
// of every sum is fixed, whatever the number of threads. Bound: K (K + 1) / 2 + O K multiply-adds a
// position.
#include "compensate/input_moments.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace fitcompress {
namespace {

constexpr int64_t kTile = 256;       // positions summed in float32
constexpr int64_t kBlock = 288;      // features of a block
constexpr int64_t kTasks = 64;       // positions are cut in chunks to have that many
constexpr int64_t kMinChunk = 2048;  // but not below that
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kStageStride =
    kTile + kMaxLanes;  // no power of two: rows in different cache sets

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int Lanes>
constexpr int64_t panel_size() {  // floats; one more row for the same reason
  return (kTile + 1) * Lanes;
}

struct Dimension {
  int64_t size;
  int64_t stride;
};

// Positions that are `stride` apart in memory, as they follow each other in a tile.
struct Run {
  int64_t offset;
  int64_t length;
};

// A StridedMatrix prepared for unfolding.
struct Matrix {
  explicit Matrix(const StridedMatrix& from) : data(from.data), group_stride(from.group_stride) {
    const auto& size = from.feature_sizes;
    const auto& stride = from.feature_strides;
    for (int64_t c = 0; c < size[0]; ++c)
      for (int64_t d = 0; d < size[1]; ++d)
        for (int64_t h = 0; h < size[2]; ++h)
          for (int64_t w = 0; w < size[3]; ++w)
            offsets.push_back(c * stride[0] + d * stride[1] + h * stride[2] + w * stride[3]);
    features = static_cast<int64_t>(offsets.size());
    adjacent = true;
    for (int64_t f = 0; f < features; ++f) adjacent &= offsets[static_cast<size_t>(f)] == f;
    count = 1;
    for (int i = 0; i < 4; ++i) {
      const Dimension next{from.position_sizes[i], from.position_strides[i]};
      count *= next.size;
      if (next.size == 1) continue;
      if (!places.empty() && places.back().stride == next.size * next.stride) {
        places.back() = {places.back().size * next.size, next.stride};
      } else {
        places.push_back(next);
      }
    }
    if (places.empty()) places.push_back({1, 1});
    // Vectors are loaded along features, or along positions and then transposed.
    adjacent = adjacent && places.back().stride != 1;
  }

  // Splits positions [begin, begin + length) into runs; returns their number.
  int64_t split(int64_t begin, int64_t length, Run* runs) const {
    std::array<int64_t, 4> index{};
    const int last = static_cast<int>(places.size()) - 1;
    int64_t rest = begin;
    for (int i = last; i >= 0; --i) {
      index[static_cast<size_t>(i)] = rest % places[static_cast<size_t>(i)].size;
      rest /= places[static_cast<size_t>(i)].size;
    }
    int64_t filled = 0;
    while (length > 0) {
      int64_t offset = 0;
      for (size_t i = 0; i < places.size(); ++i) offset += index[i] * places[i].stride;
      const size_t inner = places.size() - 1;
      const int64_t now = std::min(length, places[inner].size - index[inner]);
      runs[filled++] = {offset, now};
      length -= now;
      index[inner] = 0;
      for (size_t i = inner; i-- > 0;) {
        if (++index[i] < places[i].size) break;
        index[i] = 0;
      }
    }
    return filled;
  }

  const float* data;
  int64_t group_stride;
  int64_t features, count;  // of one group; positions
  bool adjacent;            // feature f lies f floats after the first, and positions do not
  std::vector<int64_t> offsets;
  std::vector<Dimension> places;  // dimensions of positions, merged where that is possible
};

template <int Lanes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(Lanes * sizeof(float)), may_alias));
};

// ---- Unfolding: panel[p][f] = feature f at position p, for one vector of features. --------------

template <size_t... L, class Vector>
FITCOMPRESS_INLINE void interleave(std::index_sequence<L...>, const Vector& a, const Vector& b,
                                   Vector* low, Vector* high) {
  constexpr size_t n = sizeof...(L);
  *low = __builtin_shufflevector(a, b, (L / 2 + L % 2 * n)...);
  *high = __builtin_shufflevector(a, b, (L / 2 + n / 2 + L % 2 * n)...);
}

// Transposes Lanes × Lanes floats: log₂ Lanes perfect shuffles of all rows.
template <int Lanes>
FITCOMPRESS_INLINE void transpose(const float* from, float* to) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector even[Lanes], odd[Lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) std::memcpy(&even[i], from + i * kStageStride, sizeof(Vector));
  const auto shuffle = [](const Vector* in, Vector* out) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes / 2; ++i) {
      interleave(std::make_index_sequence<Lanes>(), in[i], in[i + Lanes / 2], &out[2 * i],
                 &out[2 * i + 1]);
    }
  };
  shuffle(even, odd);
  shuffle(odd, even);
  if (Lanes >= 8) shuffle(even, odd);
  if (Lanes == 16) shuffle(odd, even);
  const Vector* const result = Lanes == 8 ? odd : even;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) *reinterpret_cast<Vector*>(to + i * Lanes) = result[i];
}

FITCOMPRESS_INLINE void copy_adjacent(const float* from, int64_t length, float* to) {
  for (; length >= 16; length -= 16, from += 16, to += 16) std::memcpy(to, from, 64);
  if (length & 8) std::memcpy(to, from, 32), from += 8, to += 8;
  if (length & 4) std::memcpy(to, from, 16), from += 4, to += 4;
  if (length & 2) std::memcpy(to, from, 8), from += 2, to += 2;
  if (length & 1) *to = *from;
}

// What one task works with. All buffers are aligned to a vector.
struct Scratch {
  Run* runs;       // [kTile]
  float* stage;    // [kMaxLanes, kStageStride]
  float* columns;  // panels of the block's columns
  float* rows;     // panels of its rows, off the diagonal; or of the outputs
  double* total;   // [rows, columns] of the block
  double* cross;   // [outputs, columns]
  double* sums;    // of the columns
  double* output_sums;
};

// Features [first, first + width) of `length` positions into panels, zero beyond the features.
template <int Lanes>
FITCOMPRESS_INLINE void unfold(const Matrix& matrix, int64_t group, int64_t first, int64_t width,
                               int64_t begin, int64_t length, const Scratch& scratch,
                               float* panels) {
  const int64_t runs = matrix.split(begin, length, scratch.runs);
  const float* const data = matrix.data + group * matrix.group_stride;
  const int64_t stride = matrix.places.back().stride;
  const int64_t* const offsets = matrix.offsets.data() + first;
  if (matrix.adjacent) {
    float* to = panels;
    const int64_t whole = width / Lanes, rest = width % Lanes;
    for (int64_t r = 0; r < runs; ++r) {
      const float* from = data + first + scratch.runs[r].offset;
      for (int64_t p = 0; p < scratch.runs[r].length; ++p, from += stride, to += Lanes) {
        for (int64_t v = 0; v < whole; ++v) {
          __builtin_prefetch(from + 8 * stride + v * Lanes);
          std::memcpy(to + v * panel_size<Lanes>(), from + v * Lanes, Lanes * sizeof(float));
        }
        if (rest == 0) continue;
        float* const tail = to + whole * panel_size<Lanes>();
        for (int64_t f = 0; f < rest; ++f) tail[f] = from[whole * Lanes + f];
        for (int64_t f = rest; f < Lanes; ++f) tail[f] = 0.0f;
      }
    }
    return;
  }
  for (int64_t panel = 0; panel < width; panel += Lanes) {
    for (int64_t f = 0; f < Lanes; ++f) {
      float* row = scratch.stage + f * kStageStride;
      if (panel + f >= width) {
        std::memset(row, 0, kTile * sizeof(float));
        continue;
      }
      const float* const from = data + offsets[panel + f];
      for (int64_t r = 0; r < runs; ++r) {
        const Run run = scratch.runs[r];
        if (stride == 1) {
          copy_adjacent(from + run.offset, run.length, row);
        } else {
          for (int64_t p = 0; p < run.length; ++p) row[p] = from[run.offset + p * stride];
        }
        row += run.length;
      }
    }
    float* const to = panels + panel / Lanes * panel_size<Lanes>();
    for (int64_t p = 0; p < length; p += Lanes) {
      transpose<Lanes>(scratch.stage + p, to + p * Lanes);
    }
  }
}

// sums[f] += Σ_p panel[p][f].
template <int Lanes>
FITCOMPRESS_INLINE void add_sums(const float* panels, int64_t width, int64_t length, double* sums) {
  using Vector = typename VectorOf<Lanes>::Type;
  for (int64_t f = 0; f < width; f += Lanes, panels += panel_size<Lanes>(), sums += Lanes) {
    const auto* const at = reinterpret_cast<const Vector*>(panels);
    Vector s0{}, s1{}, s2{}, s3{};
    int64_t p = 0;
    for (; p + 4 <= length; p += 4) s0 += at[p], s1 += at[p + 1], s2 += at[p + 2], s3 += at[p + 3];
    for (; p < length; ++p) s0 += at[p];
    const Vector sum = (s0 + s1) + (s2 + s3);
    for (int l = 0; l < Lanes; ++l) sums[l] += sum[l];
  }
}

// ---- Products. ----------------------------------------------------------------------------------

// Rows × Vectors elements a tile, as many as fit in registers.
template <int Lanes>
constexpr int kTileRows = Lanes == 16 ? 8 : 4;
constexpr int kTileVectors = 3;

// total[r][c] += Σ_p rows[p][r] · columns[p][c] for Rows × (Vectors · Lanes) elements.
template <int Lanes, int Rows, int Vectors>
FITCOMPRESS_INLINE void multiply_tile(const float* rows, const float* columns, int64_t length,
                                      double* total, int64_t stride) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector sum[Rows][Vectors] = {};
  for (int64_t p = 0; p < length; ++p) {
    Vector column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(columns + v * panel_size<Lanes>() + p * Lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += rows[p * Lanes + r] * column[v];
    }
  }
  alignas(64) float product[Vectors * Lanes];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) reinterpret_cast<Vector*>(product)[v] = sum[r][v];
    double* const to = total + r * stride;
    for (int c = 0; c < Vectors * Lanes; ++c) to[c] += product[c];
  }
}

// total += rowsᵀ columns; with `upper` at least all elements on and above the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void multiply(const float* rows, int64_t height, const float* columns,
                                 int64_t width, bool upper, int64_t length, double* total) {
  constexpr int kRows = kTileRows<Lanes>;
  const int64_t vectors = ceil_div(width, Lanes), stride = vectors * Lanes;
  for (int64_t group = 0; group < vectors; group += kTileVectors) {
    const int64_t end = std::min<int64_t>(group + kTileVectors, vectors);
    const int64_t last = upper ? std::min(height, end * Lanes) : height;
    for (int64_t r = 0; r < last; r += kRows) {
      const int64_t v = upper ? std::max(group, r / Lanes) : group;
      const float* const a = rows + r / Lanes * panel_size<Lanes>() + r % Lanes;
      const float* const b = columns + v * panel_size<Lanes>();
      double* const to = total + r * stride + v * Lanes;
      switch (end - v) {
        case 3:
          multiply_tile<Lanes, kRows, 3>(a, b, length, to, stride);
          break;
        case 2:
          multiply_tile<Lanes, kRows, 2>(a, b, length, to, stride);
          break;
        default:
          multiply_tile<Lanes, kRows, 1>(a, b, length, to, stride);
      }
    }
  }
}

// ---- Tasks. -------------------------------------------------------------------------------------

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
                  scratch, scratch.columns);
    if (block.diagonal) {
      add_sums<Lanes>(scratch.columns, block.width, length, scratch.sums);
      multiply<Lanes>(scratch.columns, block.height, scratch.columns, block.width, true, length,
                      scratch.total);
    }
    if (block.diagonal && !with_outputs) continue;
    const int64_t first = with_outputs ? output_first : block.first_row;
    const int64_t height = with_outputs ? output_height : block.height;
    unfold<Lanes>(with_outputs ? *problem.output : problem.input, block.group, first, height, begin,
                  length, scratch, scratch.rows);
    if (with_outputs && block.first_column == 0) {
      add_sums<Lanes>(scratch.rows, height, length, scratch.output_sums);
    }
    multiply<Lanes>(scratch.rows, height, scratch.columns, block.width, false, length,
                    with_outputs ? scratch.cross : scratch.total);
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
    constexpr int64_t kStrip = 8;  // rows of the transposed block, written side by side
    for (int64_t strip = 0; strip < block.width; strip += kStrip) {
      const int64_t end = std::min(strip + kStrip, block.width);
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
  for (int64_t task = (*next)++; task < blocks * problem.chunks; task = (*next)++) {
    const Block block = block_of(problem, task % blocks);
    const int64_t chunk = task / blocks;
    accumulate<Lanes>(problem, block, chunk, scratch);
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
          make_buffer<float>(kMaxLanes * kStageStride + (rows + columns) * (kTile + 1));
      const auto doubles = make_buffer<double>((columns + crossed) * columns + columns + rows);
      Scratch scratch{};
      scratch.runs = runs.get();
      scratch.stage = floats.get();
      scratch.columns = scratch.stage + kMaxLanes * kStageStride;
      scratch.rows = scratch.columns + columns * (kTile + 1);
      scratch.total = doubles.get();
      scratch.cross = scratch.total + columns * columns;
      scratch.sums = scratch.cross + crossed * columns;
      scratch.output_sums = scratch.sums + columns;
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
