// Squares of per-sample weight gradients on the CPU: a blocked matrix product whose epilogue
// squares.
//
// Both tensors are packed a segment at a time, each value once for a block of the other: the input
// as vectors of lanes (square_plan.h), the gradient as panels of outputs. A tile of outputs times
// vectors is summed over the positions in registers, squared, and added to the block's totals and
// to the norm of its sample. Totals are summed in float32 over at most 32 samples, norms in float64
// from tile to tile. Bound: B·P·O·I multiply-adds at the rate of a matrix product; packing costs a
// few percent of that.

#include "fisher/square_accumulate.h"

#include <atomic>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "fisher/pack.h"
#include "fisher/square_plan.h"
#include "fisher/square_tile.h"

namespace fitcompress {
namespace {

struct Operands {
  const float *grad, *input;
  const char* moment;  // only to fetch it in time; may be null
  int64_t moment_bytes;
};

// Work space of one thread.
struct Scratch {
  explicit Scratch(const Plan& plan, bool with_totals)
      : input(make_buffer<float>(plan.round * plan.input_size)),
        grad(make_buffer<float>(plan.round * plan.grad_size)),
        stage(make_buffer<float>(plan.stage_size)),
        products(make_buffer<float>(plan.segments > 1 ? plan.block_size : 0)),
        totals(make_buffer<float>(with_totals ? plan.block_size : 0)),
        norms(make_buffer<double>(plan.chunk * plan.width)),
        window(make_buffer<int64_t>(plan.positions)),
        at(make_buffer<int64_t>(plan.positions)),
        offset(make_buffer<int64_t>(plan.shape.inputs() + plan.vectors)),
        used(make_buffer<int64_t>(plan.vectors)),
        ordered(make_buffer<float>((plan.inner + 1) * plan.width)),
        sum(make_buffer<double>(plan.inner * plan.width)) {}

  Buffer<float> input, grad, stage, products, totals;
  Buffer<double> norms;
  Buffer<int64_t> window;  // [positions] where it begins in the packed or staged input
  Buffer<int64_t> at;      // [positions] where its inputs lie, unfolded
  Buffer<int64_t> offset;  // of a place in the window: of each vector, or of each row of it
  Buffer<int64_t> used;    // [vectors] lanes
  // Of a vector of lanes, in the order of moment:
  Buffer<float> ordered;
  Buffer<double> sum;
};

// Where windows and what is in them lie in the packed input.
FITCOMPRESS_INLINE void find_windows(const Plan& plan, const Segment& segment, int64_t* window) {
  const auto& s = plan.shape;
  const auto size = plan.extent(segment.size);
  const bool staged = plan.side == Side::kUnfolded;
  const int64_t unit = staged ? 1 : plan.width;
  const int64_t volume = size[0] * size[1] * size[2] * (staged ? s.channels : 1);
  for (int64_t n = 0; n < segment.images; ++n)
    for (int64_t d = 0; d < segment.size[0]; ++d)
      for (int64_t h = 0; h < segment.size[1]; ++h) {
        const int64_t row = n * volume + (d * s.stride[0] * size[1] + h * s.stride[1]) * size[2];
        for (int64_t w = 0; w < segment.size[2]; ++w) {
          *window++ = (row + w * s.stride[2]) * unit;
        }
      }
}

// Offsets of the kernel in a window, of `rows` only those at its left end.
FITCOMPRESS_INLINE int64_t find_offsets(const Plan& plan, const std::array<int64_t, 3>& size,
                                        bool rows, int64_t unit, int64_t* offset) {
  const auto& s = plan.shape;
  int64_t count = 0;
  for (int64_t d = 0; d < s.kernel[0]; ++d)
    for (int64_t h = 0; h < s.kernel[1]; ++h)
      for (int64_t w = 0; w < (rows ? 1 : s.kernel[2]); ++w) {
        offset[count++] =
            ((d * s.dilation[0] * size[1] + h * s.dilation[1]) * size[2] + w * s.dilation[2]) *
            unit;
      }
  return count;
}

// One segment of samples [first, first + count), packed.
template <int Lanes>
FITCOMPRESS_INLINE void pack_samples(const Plan& plan, const Operands& data, const Task& task,
                                     const Segment& segment, int64_t first, int64_t count,
                                     const Scratch& scratch) {
  const auto& s = plan.shape;
  const auto &u = s.input_strides, &t = s.grad_strides;
  const auto size = plan.extent(segment.size);
  const int64_t volume = size[0] * size[1] * size[2], places = segment.places();
  const bool by_group = plan.side == Side::kGroups;
  const int64_t rows = by_group ? 1 : s.kernel[0] * s.kernel[1] * s.channels;
  if (plan.side == Side::kUnfolded) {
    const int64_t each = find_offsets(plan, size, true, 1, scratch.offset.get() + plan.vectors);
    int64_t* const offset = scratch.offset.get() + plan.vectors;
    for (int64_t r = each; r < rows; ++r) offset[r] = offset[r - each] + volume;
  }
  Source x{}, e{};
  x.size = size;
  e.size = segment.size;
  for (size_t i = 0; i < 3; ++i) x.stride[i] = u[i + 2], e.stride[i] = t[i + 2];
  for (int64_t b = 0; b < count; ++b) {
    float* input = scratch.input.get() + b * plan.input_size;
    float* grad = scratch.grad.get() + b * plan.grad_size;
    float* stage = scratch.stage.get();
    for (int64_t n = 0; n < segment.images; ++n) {
      const int64_t image = (first + b) * s.images + segment.image + n;
      const float* from = data.input + image * u[0];
      const float* from_grad = data.grad + image * t[0];
      for (size_t i = 0; i < 3; ++i) {
        from += segment.first[i] * s.stride[i] * u[i + 2];
        from_grad += segment.first[i] * t[i + 2];
      }
      if (by_group) {
        x.lanes = e.lanes = task.lanes;
        x.lane_stride = s.channels * u[1];
        e.lane_stride = s.outputs * t[1];
        for (int64_t c = 0; c < s.channels; ++c) {
          x.data = from + (task.first_lane * s.channels + c) * u[1];
          pack<Lanes>(x, input + c * plan.panel_size, 0);
        }
        for (int64_t o = 0; o < s.outputs; ++o) {
          e.data = from_grad + (task.first_lane * s.outputs + o) * t[1];
          pack<Lanes>(e, grad + o * plan.grad_panel_size, 0);
        }
        input += volume * Lanes;
        grad += places * Lanes;
        continue;
      }
      x.lane_stride = u[1];
      e.lanes = task.rows;
      e.lane_stride = t[1];
      e.data = from_grad + (task.set * s.outputs + task.first_row) * t[1];
      pack<kTileRows<Lanes>>(e, grad, plan.grad_panel_size);
      grad += places * kTileRows<Lanes>;
      if (plan.side == Side::kChannels) {
        x.lanes = task.lanes;
        x.data = from + (task.set * s.channels + task.first_lane) * u[1];
        pack<Lanes>(x, input, plan.panel_size);
        input += volume * Lanes;
      } else {
        x.lanes = s.channels;
        x.data = from + task.set * s.channels * u[1];
        copy_box(x, stage);
        stage += s.channels * volume;
      }
    }
    if (plan.side != Side::kUnfolded) continue;
    std::memset(stage, 0, Plan::kSlack * sizeof(float));
    unfold<Lanes>(scratch.stage.get(), scratch.window.get(), segment.positions(),
                  scratch.offset.get() + plan.vectors, rows, s.kernel[2], s.dilation[2],
                  plan.unfolded_stride, input);
  }
}

template <int Lanes, int Rows>
FITCOMPRESS_INLINE void multiply_rows(const Packed& packed, const float* grad, int64_t vectors,
                                      const int64_t* offset, const int64_t* used, int64_t rows,
                                      const Sums& sums) {
  if (vectors == 3) {
    multiply_tile<Lanes, Rows, kTileVectors<Lanes>>(packed, grad, offset, used, rows, sums);
  } else if (vectors == 2) {
    multiply_tile<Lanes, Rows, 2>(packed, grad, offset, used, rows, sums);
  } else {
    multiply_tile<Lanes, Rows, 1>(packed, grad, offset, used, rows, sums);
  }
}

// Fetches as much of the rows of moment as a tile at (row, lane) covers, though not the same: all
// tiles of a block fetch all of it, while there is time.
FITCOMPRESS_INLINE void fetch(const Plan& plan, const Operands& data, const Task& task, int64_t row,
                              int64_t rows, int64_t lane, int64_t lanes) {
  for (int64_t r = row; r < std::min(row + rows, task.rows); ++r) {
    const int64_t at =
        ((task.set * plan.rows + task.first_row + r) * plan.lanes + task.first_lane) * plan.inner;
    const char* const from = data.moment + (at + lane) * data.moment_bytes;
    for (int64_t i = 0; i < lanes * data.moment_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

template <int Lanes>
FITCOMPRESS_INLINE void multiply(const Plan& plan, const Operands& data, const Task& task,
                                 const Packed& packed, const Sums& sums, const Scratch& scratch) {
  constexpr int kRows = kTileRows<Lanes>, kVectors = kTileVectors<Lanes>;
  const int64_t vectors = ceil_div(task.lanes, Lanes) * plan.inner;
  for (int64_t v = 0, now; v < vectors; v += now) {
    const int64_t left = vectors - v;
    now = std::min<int64_t>(kVectors, left == 4 ? 2 : left);
    for (int64_t r = 0; r < task.rows; r += kRows) {
      Sums at = sums;
      at.products += r * sums.stride + v * Lanes;
      if (at.totals != nullptr) at.totals += r * sums.stride + v * Lanes;
      const float* const grad = packed.grad + r / kRows * plan.grad_panel_size;
      const int64_t* const offset = scratch.offset.get() + v;
      const int64_t* const used = scratch.used.get() + v;
      const int64_t rows = task.rows - r;
      if (data.moment != nullptr) fetch(plan, data, task, r, kRows, v * Lanes, now * Lanes);
      if (rows > kRows / 2) {
        multiply_rows<Lanes, kRows>(packed, grad, now, offset, used, rows, at);
      } else {
        multiply_rows<Lanes, kRows / 2>(packed, grad, now, offset, used, rows, at);
      }
    }
  }
}

// The same with groups side by side.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_groups(const Plan& plan, Packed packed, const Sums& sums,
                                        const Scratch& scratch) {
  const int64_t kernel = plan.shape.kernel_volume(), channels = plan.shape.channels;
  const float* const input = packed.input;
  int64_t v = 0;
  for (int64_t o = 0; o < plan.shape.outputs; ++o)
    for (int64_t c = 0; c < channels; ++c) {
      packed.input = input + c * plan.panel_size;
      const float* const grad = packed.grad + o * plan.grad_panel_size;
      for (int64_t k = 0, now; k < kernel; k += now, v += now) {
        Sums at = sums;
        at.products += v * Lanes;
        if (at.totals != nullptr) at.totals += v * Lanes;
        const int64_t* const offset = scratch.offset.get() + k;
        const int64_t* const used = scratch.used.get();
        const int64_t left = kernel - k;
        if (left >= 9 && left != 25) {
          now = 9;
          multiply_strip<Lanes, 9>(packed, grad, offset, used, at);
        } else if (left >= 5) {
          now = 5;
          multiply_strip<Lanes, 5>(packed, grad, offset, used, at);
        } else if (left >= 3) {
          now = 3;
          multiply_strip<Lanes, 3>(packed, grad, offset, used, at);
        } else {
          now = 1;
          multiply_strip<Lanes, 1>(packed, grad, offset, used, at);
        }
      }
    }
}

// Squares of the samples of one task: totals[row][vector][lane], and norms[sample].
template <int Lanes>
FITCOMPRESS_INLINE void square(const Plan& plan, const Operands& data, const Task& task,
                               const Scratch& scratch, float* totals, double* norms) {
  const int64_t rows = round_up(task.rows, plan.side == Side::kGroups ? 1 : kTileRows<Lanes>);
  if (totals != nullptr) {
    std::memset(totals, 0, static_cast<size_t>(rows * plan.row_stride) * sizeof(float));
  }
  std::memset(scratch.norms.get(), 0, static_cast<size_t>(task.samples * Lanes) * sizeof(double));
  for (int64_t v = 0; v < plan.vectors; ++v) {
    const int64_t first = plan.side == Side::kGroups ? 0 : v / plan.inner * Lanes;
    scratch.used[v] = std::min<int64_t>(Lanes, task.lanes - first);
  }
  for (int64_t begin = 0; begin < task.samples; begin += plan.round) {
    const int64_t count = std::min(plan.round, task.samples - begin);
    for (int64_t i = 0; i < plan.segments; ++i) {
      const Segment segment = plan.segment(i);
      if (begin == 0 || plan.segments > 1) {
        find_windows(plan, segment, scratch.window.get());
        int64_t* const offset = scratch.offset.get();
        if (plan.side == Side::kUnfolded) {
          for (int64_t v = 0; v < plan.vectors; ++v) offset[v] = v * Lanes;
          for (int64_t p = 0; p < plan.positions; ++p) scratch.at[p] = p * plan.unfolded_stride;
        } else {
          const int64_t each = find_offsets(plan, plan.extent(segment.size), false, Lanes, offset);
          for (int64_t v = each; v < plan.panels * each; ++v) {
            offset[v] = offset[v - each] + plan.panel_size;
          }
        }
      }
      pack_samples<Lanes>(plan, data, task, segment, task.first_sample + begin, count, scratch);
      Packed packed{};
      packed.input = scratch.input.get();
      packed.grad = scratch.grad.get();
      packed.input_size = plan.input_size;
      packed.grad_size = plan.grad_size;
      packed.at = (plan.side == Side::kUnfolded ? scratch.at : scratch.window).get();
      packed.positions = segment.positions();
      packed.samples = count;
      packed.first = i == 0;
      packed.last = i + 1 == plan.segments;
      const Sums sums{scratch.products.get(), totals,
                      norms == nullptr ? nullptr : scratch.norms.get() + begin * Lanes,
                      plan.row_stride};
      if (plan.side == Side::kGroups) {
        multiply_groups<Lanes>(plan, packed, sums, scratch);
      } else {
        const bool last = packed.last && begin + count == task.samples;
        const Operands ahead{nullptr, nullptr, last ? data.moment : nullptr, data.moment_bytes};
        multiply<Lanes>(plan, ahead, task, packed, sums, scratch);
      }
    }
  }
  if (norms == nullptr) return;
  for (int64_t b = 0; b < task.samples; ++b) {
    double norm = 0.0;
    for (int l = 0; l < Lanes; ++l) norm += scratch.norms[b * Lanes + l];
    norms[b] = norm;
  }
}

// Puts from[inner][Lanes] in the order of moment: to[Lanes][inner], and writes as much as a vector
// too many.
template <int Lanes>
FITCOMPRESS_INLINE void reorder(const float* from, int64_t inner, float* to) {
  using Vector = typename VectorOf<Lanes>::Type;
  for (int64_t next = 0; next < inner; next += Lanes) {
    // The last square overlaps the one before. If it is the only one, each column overwrites what
    // the one before has too many.
    const int64_t k = std::max<int64_t>(0, std::min(next, inner - Lanes));
    Vector square[Lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < Lanes; ++i) {
      square[i] = *reinterpret_cast<const Vector*>(from + std::min(k + i, inner - 1) * Lanes);
    }
    transpose<Lanes>(square, to + k, inner);
  }
}

// moment += scale · totals of a block, of which there are `count`, `stride` apart.
template <int Lanes, class Moment>
FITCOMPRESS_INLINE void add_block(const Plan& plan, const Task& task, const float* totals,
                                  int64_t count, int64_t stride, double scale, Moment* moment,
                                  const Scratch& scratch) {
  const int64_t inner = plan.inner;
  float* const ordered = scratch.ordered.get();
  double* const sum = scratch.sum.get();
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.set * plan.rows + task.first_row + r;
    for (int64_t first = 0; first < task.lanes; first += Lanes) {
      Moment* const to = moment + (row * plan.lanes + task.first_lane + first) * inner;
      const int64_t size = std::min<int64_t>(Lanes, task.lanes - first) * inner;
      const float* from = totals + r * plan.row_stride + first * inner;
      for (int64_t n = 0; n < count; ++n, from += stride) {
        const float* next = from;
        if (inner > 1) {
          reorder<Lanes>(from, inner, ordered);
          next = ordered;
        }
        if (n == 0) {
          for (int64_t i = 0; i < size; ++i) sum[i] = next[i];
        } else {
          for (int64_t i = 0; i < size; ++i) sum[i] += next[i];
        }
      }
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<Moment>(to[i] + scale * sum[i]);
    }
  }
}

// add_block for a type of moment; empty if moment is not wanted.
using AddBlock = std::function<void(const Task&, const float* totals, int64_t count, int64_t stride,
                                    const Scratch&)>;

// Whoever is free takes the next task. Who is the last to finish a chunk of a block adds the block
// to moment, all chunks in their order.
void square_wave(const Plan& plan, const Operands& data, int64_t begin, const AddBlock& add,
                 float* partial, double* norms) {
  const int64_t samples = std::min(plan.wave, plan.shape.samples - begin);
  const int64_t chunks = ceil_div(samples, plan.chunk), tasks = plan.blocks * chunks;
  std::vector<std::atomic<int64_t>> done(static_cast<size_t>(plan.blocks));
  for (auto& each : done) each = 0;
  std::atomic<int64_t> next{0};
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    try {
      const Scratch scratch(plan, add && partial == nullptr);
      for (int64_t index = next++; index < tasks; index = next++) {
        const Task task = plan.task(index, begin);
        float* totals = nullptr;
        if (add) {
          totals = partial != nullptr ? partial + index * plan.block_size : scratch.totals.get();
        }
        double* const to =
            norms == nullptr ? nullptr : norms + task.block * plan.wave + task.first_sample - begin;
        dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
          square<lanes>(plan, data, task, scratch, totals, to);
        });
        if (!add || ++done[static_cast<size_t>(task.block)] < chunks) continue;
        if (partial != nullptr) totals = partial + task.block * plan.block_size;
        add(task, totals, chunks, plan.blocks * plan.block_size, scratch);
      }
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < tasks) throw std::bad_alloc();
}

}  // namespace

template <class Moment>
void square_accumulate_cpu(const WeightGradShape& shape, const float* output_grad,
                           const float* input, double scale, Moment* moment, double* norms) {
  if (shape.samples * shape.positions() * shape.groups * shape.outputs * shape.inputs() == 0) {
    return;
  }
  int64_t width = 0, tile_rows = 0;
  dispatch_isa([&](auto lanes) { width = lanes, tile_rows = kTileRows<lanes>; });
  const Plan plan(shape, width, tile_rows);
  AddBlock add;
  if (moment != nullptr) {
    add = [&](const Task& task, const float* totals, int64_t count, int64_t stride,
              const Scratch& scratch) {
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        add_block<lanes>(plan, task, totals, count, stride, scale, moment, scratch);
      });
    };
  }
  const int64_t chunks = ceil_div(plan.wave, plan.chunk);
  Buffer<float> partial;
  if (moment != nullptr && chunks > 1) {
    partial = make_buffer<float>(chunks * plan.blocks * plan.block_size);
  }
  Operands data{output_grad, input, nullptr, sizeof(Moment)};
  if (partial == nullptr) data.moment = reinterpret_cast<const char*>(moment);
  Buffer<double> block_norms;
  if (norms != nullptr) block_norms = make_buffer<double>(plan.blocks * plan.wave);
  for (int64_t begin = 0; begin < shape.samples; begin += plan.wave) {
    square_wave(plan, data, begin, add, partial.get(), block_norms.get());
    if (norms == nullptr) continue;
    for (int64_t b = begin; b < std::min(begin + plan.wave, shape.samples); ++b) {
      double norm = 0.0;
      for (int64_t i = 0; i < plan.blocks; ++i) norm += block_norms[i * plan.wave + b - begin];
      norms[b] += scale * norm;
    }
  }
}

template void square_accumulate_cpu(const WeightGradShape&, const float*, const float*, double,
                                    float*, double*);
template void square_accumulate_cpu(const WeightGradShape&, const float*, const float*, double,
                                    double*, double*);

}  // namespace fitcompress
