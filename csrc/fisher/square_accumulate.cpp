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

#include <algorithm>
#include <atomic>
#include <functional>
#include <new>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "common/vector.h"
#include "fisher/square_block.h"
#include "fisher/square_plan.h"

namespace fitcompress {
namespace {

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
                                  const Workspace& scratch) {
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
                                    const Workspace&)>;

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
      const Workspace scratch(plan, add && partial == nullptr);
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
              const Workspace& scratch) {
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
