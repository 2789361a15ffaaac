// norms[b] += scale · ‖G_b‖² on the CPU: Gram matrices of the positions of the output and of the
// places of the input, multiplied element by element.
//
// A task owns a pair of blocks of positions, i <= j, of one group of one sample. It multiplies the
// outputs of the two with each other, and the places of the input that they read; spreads the
// columns of both matrices over the numbers of the grid (ghost_plan.h), so that an offset of the
// kernel shifts both row and column by a constant; and sums the products of the two over all
// offsets. Places where all channels are zero, as in padding, are left out. By symmetry one half of
// each matrix is enough. Features are summed in float32, each row of the contraction too, the rest
// in float64. Bound: ½ P² (O + C · parts) multiply-adds.
#include "fisher/ghost_norms.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "fisher/ghost_lists.h"
#include "fisher/ghost_places.h"
#include "fisher/ghost_plan.h"
#include "fisher/ghost_spread.h"
#include "fisher/gram.h"

namespace fitcompress {
namespace {

constexpr int64_t kMaxLanes = 16;

constexpr int64_t whole_vectors(int64_t count) { return ceil_div(count, kMaxLanes) * kMaxLanes; }

struct Problem {
  const WeightGradShape& shape;
  const GhostPlan& plan;
  const float* output_grad;
  const float* input;
  const float* output_grad_end;
  const float* input_end;

  int64_t reach() const { return plan.length + plan.halo; }  // numbers of a block's inputs
};

// Beyond the last element of a tensor.
const float* end_of(const float* data, const WeightGradShape& shape, int64_t features,
                    const std::array<int64_t, 3>& space, const std::array<int64_t, 5>& strides) {
  const int64_t sizes[] = {shape.samples * shape.images, shape.groups * features, space[0],
                           space[1], space[2]};
  for (size_t i = 0; i < 5; ++i) {
    if (sizes[i] == 0) return data;
    data += (sizes[i] - 1) * strides[i];
  }
  return data + 1;
}

// Products of places: a row for each place of one block, a column for each of the other, or, once
// they are spread, for each number. Loops read and write up to two vectors beyond the last.
struct Matrix {
  Matrix(int64_t places, int64_t length, int64_t step)
      : lists{Places(places, step), Places(places, step)},
        stride(whole_vectors(length) + 3 * kMaxLanes),
        values(make_buffer<float>(whole_vectors(places) * stride)) {}

  const float* row(int64_t index) const { return values.get() + index * stride; }

  Places lists[2];  // of rows and columns; on the diagonal the first is both
  int64_t stride;
  Buffer<float> values;
};

// What one thread works with.
struct Workspace {
  explicit Workspace(const Problem& problem)
      : outputs(problem.plan.block, problem.plan.length, problem.shape.grad_strides[4]),
        inputs(problem.reach(), problem.reach(), input_step(problem.shape)),
        all(problem.reach(), input_step(problem.shape)) {
    const GhostPlan& plan = problem.plan;
    const int64_t most = std::max(plan.block, problem.reach());
    const int64_t features = std::max(problem.shape.outputs, problem.shape.channels);
    panels = make_buffer<float>(gram_panels(plan.blocks > 1 ? 2 * most : most, features));
    pieces = make_buffer<GramPiece>(2 * most);
    gram = {panels.get(), pieces.get()};
    starts = make_buffer<int64_t>(inputs.stride);
    lanes = make_buffer<int32_t>(2 * inputs.stride);
    table = {starts.get(), lanes.get(), lanes.get() + inputs.stride};
    bits = make_buffer<uint32_t>(problem.reach());
    row_of = make_buffer<int64_t>(problem.reach());
    size_t shifts = 0;
    for (const GhostPart& part : plan.parts) shifts = std::max(shifts, part.shifts.size());
    shifted = make_buffer<const float*>(static_cast<int64_t>(shifts));
  }

  static int64_t input_step(const WeightGradShape& shape) {
    return shape.input_strides[4] * shape.stride[2];
  }

  Matrix outputs, inputs;
  Places all;  // of the input, with zeros
  Buffer<float> panels;
  Buffer<GramPiece> pieces;
  Buffer<int64_t> starts;
  Buffer<int32_t> lanes;
  GramScratch gram;
  SpreadTable table;
  Buffer<uint32_t> bits;
  Buffer<int64_t> row_of;  // row of `inputs` for a number, or −1
  Buffer<const float*> shifted;
};

struct Task {
  int64_t sample, group;
  GhostBlock blocks[2];  // of rows and columns
  bool diagonal;         // they are the same

  int64_t columns() const { return blocks[1].last - blocks[1].first + 1; }
};

Task task_of(const Problem& problem, int64_t index) {
  const int64_t blocks = problem.plan.blocks, pairs = blocks * (blocks + 1) / 2;
  int64_t i = 0, j = index % pairs;
  while (j >= blocks - i) j -= blocks - i++;
  return {index / pairs / problem.shape.groups,
          index / pairs % problem.shape.groups,
          {ghost_block(problem.plan, i), ghost_block(problem.plan, i + j)},
          j == 0};
}

// Multiplies the places in the lists of the matrix. Columns then count from the first number of
// their block, up to `length` and a vector of zeros.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_lists(const Task& task, GramOperand operand, int64_t features,
                                       int64_t length, const Workspace& scratch, Matrix* matrix) {
  const Places& rows = matrix->lists[0];
  const Places& columns = matrix->lists[task.diagonal ? 0 : 1];
  GramOperand other = operand;
  operand.places = &rows;
  other.places = &columns;
  float* const values = matrix->values.get();
  multiply_places<Lanes>(operand, other, task.diagonal, features, scratch.gram, values,
                         matrix->stride);
  spread<Lanes>(rows.count, columns, task.diagonal, length + Lanes, values, matrix->stride,
                scratch.table);
}

template <int Lanes>
FITCOMPRESS_INLINE void multiply_outputs(const Problem& problem, const Task& task,
                                         Workspace* scratch) {
  const WeightGradShape& shape = problem.shape;
  const auto& stride = shape.grad_strides;
  Matrix& matrix = scratch->outputs;
  for (int side = 0; side < (task.diagonal ? 1 : 2); ++side) {
    list_outputs(shape, problem.plan, task.blocks[side], &matrix.lists[side]);
  }
  const float* const data = problem.output_grad + task.sample * shape.images * stride[0] +
                            task.group * shape.outputs * stride[1];
  multiply_lists<Lanes>(task, {data, problem.output_grad_end, stride[1], nullptr}, shape.outputs,
                        task.columns(), *scratch, &matrix);
  if (!task.diagonal) return;
  // The other half of the matrix counts as much as this one; the diagonal is in both.
  const Places& places = matrix.lists[0];
  for (int64_t p = 0; p < places.count; ++p) {
    matrix.values[p * matrix.stride + places.columns()[p]] *= 0.5f;
  }
}

template <int Lanes>
FITCOMPRESS_INLINE void multiply_inputs(const Problem& problem, const Task& task,
                                        const GhostPart& part, Workspace* scratch) {
  const WeightGradShape& shape = problem.shape;
  const auto& stride = shape.input_strides;
  Matrix& matrix = scratch->inputs;
  const float* const data = problem.input + task.sample * shape.images * stride[0] +
                            task.group * shape.channels * stride[1];
  for (int side = 0; side < (task.diagonal ? 1 : 2); ++side) {
    Places* const places = &matrix.lists[side];
    const bool padded = part.shifts.size() > 1;  // perhaps
    list_inputs(shape, problem.plan, part, task.blocks[side], padded ? &scratch->all : places);
    if (padded) {
      drop_zeros(data, shape.channels, stride[1], scratch->all, scratch->bits.get(), places);
    }
  }
  multiply_lists<Lanes>(task, {data, problem.input_end, stride[1], nullptr}, shape.channels,
                        task.columns() + problem.plan.halo, *scratch, &matrix);
}

// Σ_c outputs[c] Σ_k inputs[k][c], c < length, and zeros up to a whole vector: added to total.
template <int Lanes>
FITCOMPRESS_INLINE void contract_row(const float* outputs, const float* const* inputs,
                                     int64_t count, int64_t length, double* total) {
  using Vector = typename VectorOf<Lanes>::Type;
  using Anywhere = typename VectorOf<Lanes>::Anywhere;
  constexpr int kWide = 4;
  Vector wide[kWide] = {};
  int64_t c = 0;
  for (; c + (kWide - 1) * Lanes < length; c += kWide * Lanes) {
    Vector sum[kWide] = {};
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v)
        sum[v] += *reinterpret_cast<const Anywhere*>(inputs[k] + c + v * Lanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v)
      wide[v] += *reinterpret_cast<const Anywhere*>(outputs + c + v * Lanes) * sum[v];
  }
  for (; c < length; c += Lanes) {
    Vector sum = {};
    for (int64_t k = 0; k < count; ++k) sum += *reinterpret_cast<const Anywhere*>(inputs[k] + c);
    wide[0] += *reinterpret_cast<const Anywhere*>(outputs + c) * sum;
  }
  alignas(64) float lanes[Lanes];
  *reinterpret_cast<Vector*>(lanes) = (wide[0] + wide[1]) + (wide[2] + wide[3]);
  for (int l = 0; l < Lanes; ++l) total[l] += lanes[l];
}

// Adds the products of both matrices over all pairs of positions and offsets of a part.
template <int Lanes>
FITCOMPRESS_INLINE void contract(const Problem& problem, const Task& task, const GhostPart& part,
                                 Workspace* scratch, double* total) {
  const Matrix& outputs = scratch->outputs;
  const Matrix& inputs = scratch->inputs;
  const Places& positions = outputs.lists[0];
  const Places& places = inputs.lists[0];
  int64_t* const row_of = scratch->row_of.get();
  const float** const shifted = scratch->shifted.get();
  const int64_t numbers = task.blocks[0].last - task.blocks[0].first + problem.plan.halo + 1;
  std::fill(row_of, row_of + numbers, int64_t{-1});
  for (int64_t r = 0; r < places.count; ++r) row_of[places.columns()[r]] = r;
  for (int64_t p = 0; p < positions.count; ++p) {
    const int64_t number = positions.columns()[p];
    const int64_t first = task.diagonal ? number : 0;  // column
    int64_t count = 0;
    for (const int64_t shift : part.shifts) {
      const int64_t row = row_of[number + shift];
      if (row >= 0) shifted[count++] = inputs.row(row) + first + shift;
    }
    // Without any row, too: what is not finite in the outputs must show.
    contract_row<Lanes>(outputs.row(p) + first, shifted, count, task.columns() - first, total);
  }
}

// Half of what a pair of blocks adds to ‖G_b‖².
template <int Lanes>
FITCOMPRESS_INLINE double half_norm(const Problem& problem, const Task& task, Workspace* scratch) {
  multiply_outputs<Lanes>(problem, task, scratch);
  double total[Lanes] = {};
  for (const GhostPart& part : problem.plan.parts) {
    multiply_inputs<Lanes>(problem, task, part, scratch);
    contract<Lanes>(problem, task, part, scratch, total);
  }
  double sum = 0.0;
  for (int l = 0; l < Lanes; ++l) sum += total[l];
  return sum;
}

}  // namespace

void ghost_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                     double scale, double* norms) {
  const GhostPlan plan(shape);
  const int64_t per_sample = shape.groups * plan.blocks * (plan.blocks + 1) / 2;
  const int64_t tasks = shape.samples * per_sample;
  if (tasks == 0) return;
  const Problem problem{shape,
                        plan,
                        output_grad,
                        input,
                        end_of(output_grad, shape, shape.outputs, shape.places, shape.grad_strides),
                        end_of(input, shape, shape.channels, shape.space, shape.input_strides)};
  std::vector<double> halves(static_cast<size_t>(tasks));
  std::atomic<int64_t> next{0};  // each thread takes one task after the other
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    try {
      Workspace scratch(problem);
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        for (int64_t task = next++; task < tasks; task = next++) {
          halves[static_cast<size_t>(task)] =
              half_norm<lanes>(problem, task_of(problem, task), &scratch);
        }
      });
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < tasks) throw std::bad_alloc();
  for (int64_t b = 0; b < shape.samples; ++b) {
    double sum = 0.0;
    for (int64_t t = 0; t < per_sample; ++t) sum += halves[static_cast<size_t>(b * per_sample + t)];
    norms[b] += scale * (2.0 * sum);
  }
}

}  // namespace fitcompress
