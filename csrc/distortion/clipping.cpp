// Clipping on the CPU.
//
// Choice: a task owns whole rows, about kPart weights; blocks of a unit's weights stay in the
// first-level cache while every grid and candidate sums its errors over them, in float64 and fixed
// partial sums. If the whole weight is one unit, the tasks' sums are added in order. Bound: about
// one cycle a weight, grid and candidate.
//
// Sums: the units' scales now differ from grid to grid, so every grid is a pass of its own, with
// its codes as cells. The slots hold Σ FΔ², Σ F (θ̂ − θ̂ of the next grid)² and Σ F (θ − θ̂)².
#include "distortion/clipping.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/parallel.h"
#include "distortion/scale_units.h"

namespace fitcompress {
namespace {

constexpr int64_t kPart = 16384;
constexpr int64_t kBlock = 256;
constexpr int64_t kLanes = 8;  // of the partial sums, whatever the instruction set

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double)), may_alias));

// One candidate for one grid: codes are min(round(x · gain), largest), values code · spacing, both
// for x = |w| / range.
struct Candidate {
  float gain, largest;
  double spacing;
  Candidate(const Grid& grid, float clip) : largest(static_cast<float>(largest_code(grid, 0.0f))) {
    gain = static_cast<float>(double{largest} / double{clip});
    spacing = double{clip} / double{largest};
  }
};

// Weights of one unit, in units of its range; F is 0 beyond the last one.
struct Block {
  float x[kBlock];
  double magnitude[kBlock], fisher[kBlock];
};

template <class T>
FITCOMPRESS_INLINE int64_t load(const Layer<T>& layer, float range, int64_t begin, int64_t count,
                                Block* block) {
  const float divisor = range > 0.0f ? range : INFINITY;
  const double inverse = range > 0.0f ? 1.0 / double{range} : 0.0;
  for (int64_t j = 0; j < count; ++j) {
    const float w = to_float(layer.weight[begin + j]);
    const float magnitude = w < 0.0f ? -w : w;
    block->x[j] = magnitude / divisor;
    block->magnitude[j] = double{magnitude} * inverse;
    block->fisher[j] = layer.fisher == nullptr ? 1.0 : layer.fisher[begin + j];
  }
  const int64_t padded = round_up(count, kLanes);
  for (int64_t j = count; j < padded; ++j) {
    block->x[j] = 0.0f;
    block->magnitude[j] = block->fisher[j] = 0.0;
  }
  return padded;
}

// Σ F (x − its value)² over a block.
FITCOMPRESS_INLINE double sum_errors(const Block& block, int64_t padded, const Candidate& grid) {
  Doubles sum = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    Floats x;
    Doubles magnitude, fisher;
    std::memcpy(&x, block.x + j, sizeof(x));
    std::memcpy(&magnitude, block.magnitude + j, sizeof(magnitude));
    std::memcpy(&fisher, block.fisher + j, sizeof(fisher));
    const Floats rounded = (x * grid.gain + kRoundBits) - kRoundBits;
    const Floats code = rounded > grid.largest ? Floats{} + grid.largest : rounded;
    const Doubles error = magnitude - __builtin_convertvector(code, Doubles) * grid.spacing;
    sum += fisher * (error * error);
  }
  double total = 0.0;
  for (int64_t l = 0; l < kLanes; ++l) total += sum[l];
  return total;
}

// The errors of one unit, or of a part of it: one a grid and candidate.
template <class T>
FITCOMPRESS_INLINE void add_errors(const Layer<T>& layer, const std::vector<Candidate>& candidates,
                                   float range, int64_t begin, int64_t end, double* errors) {
  Block block;
  for (; begin < end; begin += kBlock) {
    const int64_t padded = load(layer, range, begin, std::min(kBlock, end - begin), &block);
    for (size_t c = 0; c < candidates.size(); ++c) {
      errors[c] += sum_errors(block, padded, candidates[c]);
    }
  }
}

void choose(const DistortionShape& shape, const double* errors, int64_t unit, float* clip) {
  const auto clips = static_cast<int64_t>(shape.clips.size());
  for (int64_t b = 0; b < shape.bit_grids(); ++b) {
    const int64_t best =
        std::min_element(errors + b * clips, errors + (b + 1) * clips) - (errors + b * clips);
    clip[b * shape.units() + unit] = shape.clips[static_cast<size_t>(best)];
  }
}

}  // namespace

template <class T>
bool choose_clips(const Layer<T>& layer, float* clip) {
  const DistortionShape& shape = *layer.shape;
  const int64_t bits = shape.bit_grids();
  std::fill(clip, clip + bits * shape.units(), shape.clips[0]);
  if (shape.clips.size() == 1) return bits > 0 && shape.clips[0] != 1.0f;
  if (bits == 0 || shape.count() == 0) return bits > 0;

  std::vector<Candidate> candidates;
  for (int64_t b = 0; b < bits; ++b) {
    for (const float c : shape.clips)
      candidates.emplace_back(shape.grids[static_cast<size_t>(b)], c);
  }
  const int64_t part_rows = std::max<int64_t>(1, kPart / shape.cols);
  const int64_t parts = ceil_div(shape.rows, part_rows);
  std::vector<double> errors(candidates.size() * static_cast<size_t>(parts), 0.0);
  parallel_for(parts, 1, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      for (int64_t p = first; p < last; ++p) {
        double* const of_part = errors.data() + p * static_cast<int64_t>(candidates.size());
        const int64_t end = std::min((p + 1) * part_rows, shape.rows) * shape.cols;
        for_each_run(shape, p * part_rows * shape.cols, end,
                     [&](int64_t unit, int64_t from, int64_t to) __attribute__((always_inline)) {
                       if (shape.group >= 0) std::fill_n(of_part, candidates.size(), 0.0);
                       add_errors(layer, candidates, layer.range[unit], from, to, of_part);
                       if (shape.group >= 0) choose(shape, of_part, unit, clip);
                     });
      }
    });
  });
  if (shape.group < 0) {
    for (size_t i = candidates.size(); i < errors.size(); ++i) {
      errors[i % candidates.size()] += errors[i];
    }
    choose(shape, errors.data(), 0, clip);
  }
  return true;
}

namespace {

// The scales of a grid and of the next one in every unit's weights, and the sums' terms.
struct ClippedBlock {
  float weight[kBlock], divisor[kBlock], gain[kBlock], next_gain[kBlock];
  double delta[kBlock], next_delta[kBlock];
  uint32_t key[kBlock];
  float code[kBlock];
  alignas(64) double terms[4 * kBlock];
};

// Two neighbouring grids with their clips; the last grid is its own neighbour, at length 0.
struct ClippedPair {
  float largest, next_largest;
  const float *clip, *next_clip;  // [U]
};

template <class T>
FITCOMPRESS_INLINE void set_scales(const Layer<T>& layer, const ClippedPair& grids, int64_t begin,
                                   int64_t end, ClippedBlock* block) {
  for_each_run(*layer.shape, begin, end,
               [&](int64_t unit, int64_t first, int64_t last) __attribute__((always_inline)) {
                 const float range = layer.range[unit];
                 const double clip = grids.clip[unit], next_clip = grids.next_clip[unit];
                 for (int64_t j = first - begin; j < last - begin; ++j) {
                   block->divisor[j] = range > 0.0f ? range : INFINITY;
                   block->gain[j] = static_cast<float>(grids.largest / clip);
                   block->next_gain[j] = static_cast<float>(grids.next_largest / next_clip);
                   block->delta[j] = clip * range / grids.largest;
                   block->next_delta[j] = next_clip * range / grids.next_largest;
                 }
               });
}

FITCOMPRESS_INLINE float clipped_code(float x, float gain, float largest) {
  const float rounded = (x * gain + kRoundBits) - kRoundBits;
  return rounded > largest ? largest : rounded;
}

template <class T>
FITCOMPRESS_INLINE void fill_clipped(const Layer<T>& layer, const ClippedPair& grids, int64_t begin,
                                     int64_t end, const SlotTables& tables, Slot* slots) {
  ClippedBlock block;
  for (; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    set_scales(layer, grids, begin, begin + count, &block);
    layer.importance.keys(begin, count, block.key);
    for (int64_t j = 0; j < count; ++j) block.weight[j] = to_float(layer.weight[begin + j]);
    for (int64_t j = 0; j < count; ++j) {
      const float w = block.weight[j];
      const float magnitude = w < 0.0f ? -w : w;
      const float x = magnitude / block.divisor[j];
      const float code = clipped_code(x, block.gain[j], grids.largest);
      const float next_code = clipped_code(x, block.next_gain[j], grids.next_largest);
      const double f = layer.fisher == nullptr ? 1.0 : layer.fisher[begin + j];
      const double value = double{code} * block.delta[j];
      const double step = value - double{next_code} * block.next_delta[j];
      const double error = double{magnitude} - value;
      block.code[j] = code;
      block.terms[4 * j] = f * (block.delta[j] * block.delta[j]);
      block.terms[4 * j + 1] = f * (step * step);
      block.terms[4 * j + 2] = f * (error * error);
      block.terms[4 * j + 3] = w < 0.0f ? kNegative : 1.0;
    }
    for (int64_t j = 0; j < count; ++j) {
      const auto cell = static_cast<int64_t>(block.code[j]) - tables.first_cell;
      if (cell < 0 || cell >= tables.last_cell - tables.first_cell) continue;
      const Thresholds& thresholds = *layer.thresholds;
      const uint16_t entry = thresholds.bin_class[thresholds.bin(block.key[j])];
      const uint32_t of_class = thresholds.class_of(entry, block.key[j], begin + j);
      add_terms(block.terms + 4 * j, slots + cell * tables.classes + of_class);
    }
  }
}

}  // namespace

template <class T>
void sum_clipped(const Layer<T>& layer, const float* clip, const PassPlan& plan, ClassSums* sums) {
  const DistortionShape& shape = *layer.shape;
  const auto bits = static_cast<size_t>(shape.bit_grids());
  const auto units = static_cast<size_t>(shape.units());
  for (size_t b = 0; b < bits; ++b) {
    const size_t next = std::min(b + 1, bits - 1);
    const ClippedPair grids{static_cast<float>(largest_code(shape.grids[b], 0.0f)),
                            static_cast<float>(largest_code(shape.grids[next], 0.0f)),
                            clip + b * units, clip + next * units};
    GridGroup group;
    group.first = b;
    group.own = 1;
    group.add(1.0f, 0.0f, 1.0, grids.largest);
    double* const to_next = sums->to_next.data() + static_cast<int64_t>(b) * sums->pitch;
    sum_group(plan, group, false, sums, [&](SlotTables* tables) {
      fill_chunks(shape.count(), tables,
                  [&](int64_t begin, int64_t end, Slot* slots, auto) __attribute__((
                      always_inline)) { fill_clipped(layer, grids, begin, end, *tables, slots); });
      for (int64_t chunk = 0; chunk < tables->chunks; ++chunk) {
        for (int64_t i = 0; i < tables->size(); ++i) {
          to_next[i % tables->classes] += tables->table(chunk)[i].moment[1];
        }
      }
    });
  }
  GridGroup nothing;  // one grid with the code 0 only: its errors are the weights themselves
  nothing.steps = true;
  nothing.add(INFINITY, 0.0f, 0.0, 0.0f);
  sum_group(plan, nothing, true, sums,
            [&](SlotTables* tables) { fill_slots(layer, nothing, tables); });
}

#define FITCOMPRESS_CLIPPING(T)                           \
  template bool choose_clips<T>(const Layer<T>&, float*); \
  template void sum_clipped<T>(const Layer<T>&, const float*, const PassPlan&, ClassSums*);
FITCOMPRESS_CLIPPING(float)
FITCOMPRESS_CLIPPING(BFloat16)
FITCOMPRESS_CLIPPING(Float16)

}  // namespace fitcompress
