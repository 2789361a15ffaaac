// Distortion table on the CPU, in three steps and a few reads of the layer.
//
// 1. inspection.h: ranges of the scale units, and whether all values are numbers;
// 2. thresholds.h: which weights leave at which sparsity, hence the class of every weight;
// 3. per group of grids whose codes are functions of one number: one pass (slots.h) sums a weight's
//    share into the slot of its cell and class, and the cells (cells.h) give all tables. The work
//    per weight hardly depends on the number of grids and not at all on that of the sparsities.
//
// If the fixed-point grids choose their clips, scales differ from grid to grid: clipping.h.
#include "distortion/distortion_table.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "distortion/cells.h"
#include "distortion/clipping.h"
#include "distortion/inspection.h"
#include "distortion/passes.h"
#include "distortion/slots.h"
#include "distortion/workspace.h"

namespace fitcompress {
namespace {

constexpr int64_t kLarge = int64_t{1} << 20;             // weights
constexpr int64_t kFloor = 3 << 19, kCeiling = 8 << 20;  // bytes
constexpr float kTypical = 5.0f;                         // root mean squares
constexpr int64_t kMostCells = int64_t{1} << 30;         // an index of a cell is an int32_t

// Bytes that temporary tables may take: a share of the weight, where that is large.
template <class T>
int64_t memory_budget(int64_t count) {
  if (count < kLarge) return kFloor;
  return std::min(count * static_cast<int64_t>(sizeof(T)) * 2 / 25, kCeiling);
}

GridGroup make_group(const DistortionShape& shape, size_t first, size_t own, size_t size,
                     float max_weight) {
  GridGroup group;
  group.first = first;
  group.own = own;
  group.steps = shape.grids[first].bits == 0;
  for (size_t g = first; g < first + size; ++g) {
    const auto step = static_cast<float>(shape.grids[g].step);
    const double q = largest_code(shape.grids[g], 0.0f);
    if (group.steps) {
      group.add(step, shape.dead_zone * step, step, max_weight);
    } else {
      group.add(static_cast<float>(q), 0.0f, 1.0 / q, 1.0f);
    }
  }
  return group;
}

}  // namespace

GridGroup next_group(const DistortionShape& shape, size_t first, size_t end, int64_t max_cells,
                     float max_weight, float typical) {
  const auto with = [&](size_t own) {
    return make_group(shape, first, own, std::min(own + 1, end - first), max_weight);
  };
  const auto cells = [&](const GridGroup& of) {
    return of.steps ? of.cell(typical) + 1 : of.cells();
  };
  GridGroup group = with(1);
  for (size_t own = 2; own <= end - first; ++own) {
    GridGroup larger = with(own);
    // Without room for a grid and its neighbour there are several passes anyway.
    if (cells(larger) > max_cells && cells(group) <= max_cells) break;
    if (larger.cells() > kMostCells) break;
    group = std::move(larger);
  }
  return group;
}

namespace {

// The rule that the arguments ask for, and a key that no weight's key exceeds.
template <class T>
Importance<T> importance_rule(const Inspection& found, const T* weight, const float* fisher,
                              const float* given, float offset, uint32_t* max_key) {
  Importance<T> rule{ImportanceRule::kMagnitude, weight, fisher, given, offset};
  float max = found.max_weight;
  if (given != nullptr) {
    rule.rule = ImportanceRule::kGiven;
    max = found.max_given;
  } else if (offset < INFINITY) {
    rule.rule = ImportanceRule::kFisher;
    max = (found.max_fisher + offset) * (max * max);
  }
  *max_key = bits_of_float(max) & kMagnitudeBits;
  return rule;
}

// Adds all grids to the sums; clipped: except fixed-point ones, which, like what pruning costs, are
// there already.
template <class T>
void sum_groups(const Layer<T>& layer, const Inspection& found, const PassPlan& plan, bool clipped,
                ClassSums* sums) {
  const DistortionShape& shape = *layer.shape;
  const auto bits = static_cast<size_t>(shape.bit_grids());
  const double mean_square = found.sum_squares / static_cast<double>(plan.count);
  const float typical =
      std::min(kTypical * static_cast<float>(std::sqrt(mean_square)), found.max_weight);
  bool sum_pruned = !clipped;
  for (size_t first = clipped ? bits : 0; first < shape.grids.size();) {
    const size_t end = first < bits ? bits : shape.grids.size();
    const GridGroup group =
        next_group(shape, first, end, plan.max_cells(), found.max_weight, typical);
    sum_group(plan, group, sum_pruned, sums,
              [&](SlotTables* tables) { fill_slots(layer, group, tables); });
    sum_pruned = false;
    first += group.own;
  }
}

}  // namespace

int64_t DistortionShape::bit_grids() const {
  return std::count_if(grids.begin(), grids.end(), [](const Grid& g) { return g.bits > 0; });
}

int64_t DistortionShape::units() const {
  if (group < 0) return 1;
  return group == 0 ? rows : rows * ceil_div(cols, group);
}

double largest_code(const Grid& grid, float max) {
  if (grid.bits > 0) return static_cast<double>((int64_t{1} << (grid.bits - 1)) - 1);
  return std::ceil(double{max} / static_cast<float>(grid.step));
}

std::string step_too_small(const Grid& grid, float max) {
  std::ostringstream text;
  text << "a step of " << grid.step << " gives codes up to " << largest_code(grid, max)
       << " for the largest weight, " << max << "; at most " << kLargestCode
       << " are possible: use larger steps";
  return text.str();
}

std::string importance_too_large(float max_weight, float max_fisher, float offset) {
  if (std::isfinite((max_fisher + offset) * (max_weight * max_weight))) return {};
  std::ostringstream text;
  text << "importances are beyond float32 for weights up to " << max_weight
       << " and a Fisher diagonal up to " << max_fisher
       << ": take magnitudes (smoothing=inf), or give an importance";
  return text.str();
}

template <class T>
std::string distortion_table_cpu(const DistortionShape& shape, const T* weight, const float* fisher,
                                 const float* importance, const DistortionTable& table) {
  const int64_t count = shape.count();
  const Inspection found = inspect(shape, weight, fisher, importance, table.range);
  if (!found.problem.empty()) return found.problem;
  for (const Grid& grid : shape.grids) {
    if (largest_code(grid, found.max_weight) > kLargestCode) {
      return step_too_small(grid, found.max_weight);
    }
  }
  const bool smooth = fisher != nullptr && std::isfinite(shape.smoothing);
  const double mean = found.sum_fisher / static_cast<double>(std::max<int64_t>(count, 1));
  *table.offset = smooth ? static_cast<float>(shape.smoothing * mean) : INFINITY;
  if (smooth && importance == nullptr) {
    const std::string problem =
        importance_too_large(found.max_weight, found.max_fisher, *table.offset);
    if (!problem.empty()) return problem;
  }

  uint32_t max_key = 0;
  const Importance<T> rule =
      importance_rule(found, weight, fisher, importance, *table.offset, &max_key);
  const int64_t budget = memory_budget<T>(count);
  Workspace workspace(budget);
  Thresholds thresholds;
  if (count > 0) {
    thresholds = find_thresholds(rule, count, shape.dropped, max_key, budget, &workspace);
  }
  for (size_t s = 0; s < shape.dropped.size(); ++s) {
    table.threshold[s] = count > 0 ? float_of_bits(thresholds.key[s]) : 0.0f;
    table.position[s] = count > 0 ? thresholds.position[s] : 0;
  }

  ClassSums sums(static_cast<int64_t>(shape.grids.size()),
                 static_cast<int64_t>(shape.dropped.size()) + 1);
  const Layer<T> layer{&shape, weight, fisher, table.range, rule, &thresholds};
  const bool clipped = choose_clips(layer, table.clip);
  if (count == 0 || shape.dropped.empty()) {
    fill_tables(sums, count, table);
    return {};
  }
  const PassPlan plan{count, budget, sums.classes, &workspace};
  if (clipped) sum_clipped(layer, table.clip, plan, &sums);
  sum_groups(layer, found, plan, clipped, &sums);
  fill_tables(sums, count, table);
  return {};
}

template std::string distortion_table_cpu<float>(const DistortionShape&, const float*, const float*,
                                                 const float*, const DistortionTable&);
template std::string distortion_table_cpu<BFloat16>(const DistortionShape&, const BFloat16*,
                                                    const float*, const float*,
                                                    const DistortionTable&);
template std::string distortion_table_cpu<Float16>(const DistortionShape&, const Float16*,
                                                   const float*, const float*,
                                                   const DistortionTable&);

}  // namespace fitcompress
