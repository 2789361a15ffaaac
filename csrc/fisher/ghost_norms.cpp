// norms[b] += scale · ‖G_b‖² on the CPU: Gram matrices of the positions of the output and of the
// places of the input, multiplied element by element.
//
// A task owns a pair of blocks of positions, i <= j, of one group of one sample. It computes the
// products of the outputs of both, and of the input places that they read; spreads the columns of
// both matrices over the numbers of the grid (ghost_plan.h), so that an offset of the kernel is a
// shift of both row and column; and sums the products of the two over all offsets. Symmetry halves
// all of it. Places where no channel of the input is other than zero, as in padding, are left out.
// Products of features are summed in float32, each row of the contraction too, and the rest in
// float64. Bound: ½ P² (O + C) multiply-adds, with C multiplied by the number of parts.
#include "fisher/ghost_norms.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "fisher/ghost_places.h"
#include "fisher/ghost_plan.h"
#include "fisher/gram.h"

namespace fitcompress {
namespace {

constexpr int64_t kMaxLanes = 16;

struct Problem {
  const WeightGradShape& shape;
  const GhostPlan& plan;
  const float* output_grad;
  const float* input;
  const float* output_grad_end;
  const float* input_end;
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

// Where the columns of a matrix go: vector v of the result is made of those from start[v] on,
// rearranged by `index`, zero where `mask` is.
struct SpreadTable {
  int64_t* start;
  int32_t* index;
  int32_t* mask;
};

// What one thread works with. Rows of a matrix have room for two vectors beyond the last column:
// the loops go beyond it.
struct Scratch {
  explicit Scratch(const Problem& problem)
      : outputs{Places(problem.plan.block, output_step(problem)),
                Places(problem.plan.block, output_step(problem))},
        inputs{Places(reach(problem), input_step(problem)),
               Places(reach(problem), input_step(problem))},
        all(reach(problem), input_step(problem)),
        output_stride(row_of(problem.plan.length)),
        input_stride(row_of(reach(problem))) {
    const auto& plan = problem.plan;
    const int64_t most = std::max(plan.block, reach(problem));
    size_t shifts = 0;
    for (const GhostPart& part : plan.parts) shifts = std::max(shifts, part.shifts.size());
    output_gram = make_buffer<float>(rows_of(plan.block) * output_stride);
    input_gram = make_buffer<float>(rows_of(reach(problem)) * input_stride);
    const int64_t sides = plan.blocks > 1 ? 2 : 1;
    panels = make_buffer<float>(gram_panels(sides * most));
    pieces = make_buffer<GramPiece>(2 * most);
    gram = {panels.get(), pieces.get()};
    starts = make_buffer<int64_t>(row_of(most));
    indices = make_buffer<int32_t>(2 * row_of(most));
    table = {starts.get(), indices.get(), indices.get() + row_of(most)};
    bits = make_buffer<uint32_t>(most);
    row_of_number = make_buffer<int64_t>(reach(problem));
    shifted = make_buffer<const float*>(static_cast<int64_t>(shifts));
  }

  static int64_t reach(const Problem& problem) { return problem.plan.length + problem.plan.halo; }
  static int64_t output_step(const Problem& problem) { return problem.shape.grad_strides[4]; }
  static int64_t input_step(const Problem& problem) {
    return problem.shape.input_strides[4] * problem.shape.stride[2];
  }
  static int64_t rows_of(int64_t count) { return ceil_div(count, kMaxLanes) * kMaxLanes; }
  static int64_t row_of(int64_t count) { return rows_of(count) + 3 * kMaxLanes; }

  Places outputs[2], inputs[2];  // of the rows and the columns
  Places all;
  int64_t output_stride, input_stride;
  Buffer<float> output_gram, input_gram, panels;
  Buffer<GramPiece> pieces;
  Buffer<int64_t> starts;
  Buffer<int32_t> indices;
  GramScratch gram;
  SpreadTable table;
  Buffer<uint32_t> bits;
  Buffer<int64_t> row_of_number;  // the row of the input's matrix, or −1
  Buffer<const float*> shifted;
};

// Positions of one block.
struct Range {
  int64_t begin, end;   // positions
  int64_t first, last;  // their numbers
};

Range range_of(const GhostPlan& plan, int64_t block) {
  const int64_t begin = block * plan.block, end = std::min(begin + plan.block, plan.positions);
  return {begin, end, plan.number(begin), plan.number(end - 1)};
}

// The positions of a block in the gradient of the output; columns count from its first number.
void list_outputs(const Problem& problem, const Range& range, Places* places) {
  const GhostPlan& plan = problem.plan;
  const auto& stride = problem.shape.grad_strides;
  places->clear();
  for (int64_t p = range.begin, length; p < range.end; p += length) {
    const int64_t w = p % plan.places[2], h = p / plan.places[2] % plan.places[1];
    const int64_t d = p / plan.places[2] / plan.places[1] % plan.places[0];
    const int64_t n = p / plan.image_positions;
    length = std::min(plan.places[2] - w, range.end - p);
    places->add(n * stride[0] + d * stride[2] + h * stride[3] + w * stride[4],
                plan.number(p) - range.first, length);
  }
}

// The places of the input that the positions of a block read, or more.
void list_inputs(const Problem& problem, const GhostPart& part, const Range& range,
                 Places* places) {
  const GhostPlan& plan = problem.plan;
  const auto& step = problem.shape.input_strides;
  const auto& stride = problem.shape.stride;
  const auto& needed = part.needed;
  const int64_t end = range.last + plan.halo + 1, width = plan.grid[2];
  places->clear();
  for (int64_t u = range.first, length; u < end; u += length) {
    const int64_t begin = u % width, line = u / width, h = line % plan.grid[1];
    const int64_t d = line / plan.grid[1] % plan.grid[0], n = u / plan.image;
    length = std::min(width - begin, end - u);
    if (!needed[0][static_cast<size_t>(d)] || !needed[1][static_cast<size_t>(h)]) continue;
    const int64_t at =
        part.origin + n * step[0] + d * stride[0] * step[2] + h * stride[1] * step[3];
    for (int64_t w = begin, run; w < begin + length; w += run) {
      run = 1;
      if (!needed[2][static_cast<size_t>(w)]) continue;
      while (w + run < begin + length && needed[2][static_cast<size_t>(w + run)]) ++run;
      places->add(at + w * stride[2] * step[4], u + w - begin - range.first, run);
    }
  }
}

// Leaves out the places where all features are zero.
FITCOMPRESS_INLINE void drop_zeros(const float* data, int64_t features, int64_t feature_stride,
                                   const Places& from, uint32_t* __restrict bits, Places* to) {
  typedef uint32_t Bits __attribute__((may_alias));
  constexpr uint32_t kMagnitude = 0x7fffffffu;
  constexpr int64_t kSome = 16;
  const auto* const all = reinterpret_cast<const Bits*>(data);
  std::memset(bits, 0, static_cast<size_t>(from.count) * sizeof(uint32_t));
  const auto zeros = [&]() __attribute__((always_inline)) {
    bool any = false;
    for (int64_t p = 0; p < from.count; ++p) any |= (bits[p] & kMagnitude) == 0;
    return any;
  };

  // Rows of places, one feature after the other: where places are adjacent, or to find out where
  // it is worth going on.
  int64_t begin = 0;
  const int64_t rows = feature_stride == 1 ? 0 : from.step == 1 ? features : kSome;
  while (begin < std::min(rows, features) && zeros()) {
    const int64_t end = std::min(begin + kSome, features);
    for (; begin < end; ++begin) {
      for (int64_t r = 0; r < from.runs; ++r) {
        const PlaceRun& run = from.run(r);
        const Bits* const at = all + begin * feature_stride + run.at;
        uint32_t* __restrict const sum = bits + run.first;
        if (from.step == 1) {
          for (int64_t i = 0; i < run.length; ++i) sum[i] |= at[i];
        } else {
          for (int64_t i = 0; i < run.length; ++i) sum[i] |= at[i * from.step];
        }
      }
    }
  }
  // One place after the other.
  to->clear();
  for (int64_t p = 0; p < from.count; ++p) {
    const Bits* const at = all + from.offsets()[p];
    for (int64_t f = begin; f < features && (bits[p] & kMagnitude) == 0; f += kSome) {
      const int64_t end = std::min(f + kSome, features);
      uint32_t any = 0;
      if (feature_stride == 1) {
        for (int64_t i = f; i < end; ++i) any |= at[i];
      } else {
        for (int64_t i = f; i < end; ++i) any |= at[i * feature_stride];
      }
      bits[p] |= any;
    }
    if ((bits[p] & kMagnitude) != 0) to->add(from.offsets()[p], from.columns()[p], 1);
  }
}

// Moves the columns of a matrix to their numbers, with zeros between them and after the last, up to
// `width`, from right to left. With `upper`, of a row only what is on and right of the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void spread(int64_t rows, const Places& columns, bool upper, int64_t width,
                               float* matrix, int64_t stride, const SpreadTable& table) {
  using Vector = typename VectorOf<Lanes>::Type;
  using Indices = typename VectorOf<Lanes>::Indices;
  const int64_t vectors = ceil_div(width, Lanes);
  if (columns.spans == 1 && columns.span(0).at == 0) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(matrix + r * stride + columns.count, matrix + r * stride + vectors * Lanes, 0.0f);
    }
    return;
  }
  std::fill(table.mask, table.mask + vectors * Lanes, 0);
  std::fill(table.index, table.index + vectors * Lanes, 0);
  std::fill(table.start, table.start + vectors, int64_t{0});
  for (int64_t p = columns.count; p-- > 0;) table.start[columns.columns()[p] / Lanes] = p;
  for (int64_t p = 0; p < columns.count; ++p) {
    const int64_t column = columns.columns()[p];
    table.mask[column] = -1;
    table.index[column] = static_cast<int32_t>(p - table.start[column / Lanes]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = matrix + r * stride;
    const int64_t first = upper ? columns.columns()[r] / Lanes : 0;
    for (int64_t v = vectors; v-- > first;) {
      Vector value;
      Indices index, mask;
      std::memcpy(&value, row + table.start[v], sizeof(value));
      std::memcpy(&index, table.index + v * Lanes, sizeof(index));
      std::memcpy(&mask, table.mask + v * Lanes, sizeof(mask));
      permute<Lanes>(&value, index);
      const Indices result = reinterpret_cast<Indices>(value) & mask;
      std::memcpy(row + v * Lanes, &result, sizeof(result));
    }
  }
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

// Half of what a pair of blocks adds to ‖G_b‖².
template <int Lanes>
FITCOMPRESS_INLINE double half_norm(const Problem& problem, int64_t sample, int64_t group,
                                    int64_t i, int64_t j, Scratch* scratch) {
  const WeightGradShape& shape = problem.shape;
  const GhostPlan& plan = problem.plan;
  const bool diagonal = i == j;
  const Range ranges[] = {range_of(plan, i), range_of(plan, j)};
  const Range& rows = ranges[0];
  const Range& columns = ranges[1];
  const int64_t length = columns.last - columns.first + 1;

  const int64_t first_image = sample * shape.images;
  GramOperand operands[2];
  for (int side = 0; side < 2; ++side) {
    Places* const places = &scratch->outputs[diagonal ? 0 : side];
    if (side == 0 || !diagonal) list_outputs(problem, ranges[side], places);
    operands[side] = {problem.output_grad + first_image * shape.grad_strides[0] +
                          group * shape.outputs * shape.grad_strides[1],
                      problem.output_grad_end, shape.grad_strides[1], places};
  }
  float* const outputs = scratch->output_gram.get();
  const int64_t output_stride = scratch->output_stride;
  const Places& positions = *operands[0].places;
  multiply_places<Lanes>(operands[0], operands[1], diagonal, shape.outputs, scratch->gram, outputs,
                         output_stride);
  spread<Lanes>(positions.count, *operands[1].places, diagonal, length + Lanes, outputs,
                output_stride, scratch->table);
  if (diagonal) {
    for (int64_t p = 0; p < positions.count; ++p) {
      outputs[p * output_stride + positions.columns()[p]] *= 0.5f;
    }
  }

  double total[Lanes] = {};
  float* const inputs = scratch->input_gram.get();
  const int64_t input_stride = scratch->input_stride;
  for (const GhostPart& part : plan.parts) {
    for (int side = 0; side < 2; ++side) {
      Places* const places = &scratch->inputs[diagonal ? 0 : side];
      operands[side] = {problem.input + first_image * shape.input_strides[0] +
                            group * shape.channels * shape.input_strides[1],
                        problem.input_end, shape.input_strides[1], places};
      if (side == 1 && diagonal) continue;
      if (part.shifts.size() == 1) {
        list_inputs(problem, part, ranges[side], places);
      } else {
        list_inputs(problem, part, ranges[side], &scratch->all);
        drop_zeros(operands[side].data, shape.channels, shape.input_strides[1], scratch->all,
                   scratch->bits.get(), places);
      }
    }
    const Places& places = *operands[0].places;
    multiply_places<Lanes>(operands[0], operands[1], diagonal, shape.channels, scratch->gram,
                           inputs, input_stride);
    spread<Lanes>(places.count, *operands[1].places, diagonal, length + plan.halo + Lanes, inputs,
                  input_stride, scratch->table);

    int64_t* const row_of = scratch->row_of_number.get();
    std::fill(row_of, row_of + rows.last - rows.first + plan.halo + 1, int64_t{-1});
    for (int64_t r = 0; r < places.count; ++r) row_of[places.columns()[r]] = r;
    for (int64_t p = 0; p < positions.count; ++p) {
      const int64_t number = positions.columns()[p];
      const int64_t first = diagonal ? number : 0;  // column
      const float** const shifted = scratch->shifted.get();
      int64_t count = 0;
      for (const int64_t shift : part.shifts) {
        const int64_t row = row_of[number + shift];
        if (row >= 0) shifted[count++] = inputs + row * input_stride + first + shift;
      }
      contract_row<Lanes>(outputs + p * output_stride + first, shifted, count, length - first,
                          total);
    }
  }
  double sum = 0.0;
  for (int l = 0; l < Lanes; ++l) sum += total[l];
  return sum;
}

// Takes one task after another until none is left.
template <int Lanes>
FITCOMPRESS_INLINE void work(const Problem& problem, int64_t pairs, int64_t tasks, Scratch* scratch,
                             std::atomic<int64_t>* next, double* halves) {
  for (int64_t task = (*next)++; task < tasks; task = (*next)++) {
    const int64_t group = task / pairs % problem.shape.groups;
    const int64_t sample = task / pairs / problem.shape.groups;
    int64_t i = 0, j = task % pairs;
    while (j >= problem.plan.blocks - i) j -= problem.plan.blocks - i++;
    halves[task] = half_norm<Lanes>(problem, sample, group, i, i + j, scratch);
  }
}

}  // namespace

void ghost_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                     double scale, double* norms) {
  const GhostPlan plan(shape);
  const int64_t pairs = plan.blocks * (plan.blocks + 1) / 2;
  const int64_t tasks = shape.samples * shape.groups * pairs;
  if (tasks == 0) return;
  const Problem problem{shape,
                        plan,
                        output_grad,
                        input,
                        end_of(output_grad, shape, shape.outputs, shape.places, shape.grad_strides),
                        end_of(input, shape, shape.channels, shape.space, shape.input_strides)};
  std::vector<double> halves(static_cast<size_t>(tasks));
  std::atomic<int64_t> next{0};
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    try {
      Scratch scratch(problem);
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        work<lanes>(problem, pairs, tasks, &scratch, &next, halves.data());
      });
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < tasks) throw std::bad_alloc();
  const int64_t per_sample = shape.groups * pairs;
  for (int64_t b = 0; b < shape.samples; ++b) {
    double sum = 0.0;
    for (int64_t t = 0; t < per_sample; ++t) sum += halves[b * per_sample + t];
    norms[b] += scale * (2.0 * sum);
  }
}

}  // namespace fitcompress
