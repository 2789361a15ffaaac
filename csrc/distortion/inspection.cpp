// Inspection of a layer on the CPU: one read of weights, Fisher diagonal and importances.
//
// A task owns whole rows, about kPart weights, and writes the ranges of their scale units; if the
// whole weight is one unit, the maxima of the tasks are combined afterwards. Only if a value is not
// allowed does a second, plain loop look for the first one. Bound: one read from memory.
#include "distortion/inspection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "distortion/importance.h"
#include "distortion/scale_units.h"

namespace fitcompress {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // weights: waking one up takes as long
constexpr int64_t kPart = 65536;
constexpr int64_t kLanes = 8;  // of the partial sums, whatever the instruction set
constexpr uint32_t kInfinity = 0x7f800000u;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double)), may_alias));

struct Part {
  uint32_t weight = 0, fisher = 0, given = 0;  // largest bit patterns
  double sum_fisher = 0, sum_squares = 0;
};

// The largest bit pattern of |x|, which orders like |x| and puts what is not finite at the top.
template <class T>
FITCOMPRESS_INLINE uint32_t max_magnitude(const T* values, int64_t count) {
  uint32_t max = 0;
  for (int64_t i = 0; i < count; ++i) {
    max = std::max(max, bits_of_float(to_float(values[i])) & kMagnitudeBits);
  }
  return max;
}

// The same without dropping the sign, except that of -0: negative numbers end up at the top.
FITCOMPRESS_INLINE uint32_t max_pattern(const float* values, int64_t count) {
  uint32_t max = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of_float(values[i]);
    max = std::max(max, bits == 0x80000000u ? 0 : bits);
  }
  return max;
}

// Σ of the values to a power of 1 or 2.
template <int Power, class T>
FITCOMPRESS_INLINE double sum(const T* values, int64_t count) {
  Doubles lanes[2] = {};
  double total = 0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int64_t half = 0; half < 2; ++half) {
      Floats part;
      for (int64_t l = 0; l < kLanes; ++l) part[l] = to_float(values[i + half * kLanes + l]);
      const Doubles wide = __builtin_convertvector(part, Doubles);
      lanes[half] += Power == 1 ? wide : wide * wide;
    }
  }
  for (; i < count; ++i) {
    const double value = to_float(values[i]);
    total += Power == 1 ? value : value * value;
  }
  lanes[0] += lanes[1];
  for (int64_t l = 0; l < kLanes; ++l) total += lanes[0][l];
  return total;
}

template <class T>
std::string first_problem(const DistortionShape& shape, const T* weight, const float* fisher,
                          const float* importance) {
  std::ostringstream text;
  for (int64_t i = 0; i < shape.count(); ++i) {
    if (!std::isfinite(to_float(weight[i]))) {
      text << "weight must be finite, got " << to_float(weight[i]);
    } else if (importance != nullptr && !(importance[i] >= 0)) {
      text << "importance must be at least 0, got " << importance[i];
    } else if (fisher != nullptr && !(fisher[i] >= 0 && std::isfinite(fisher[i]))) {
      text << "fisher must be finite and at least 0, got " << fisher[i];
    } else {
      continue;
    }
    text << " at row " << i / shape.cols << ", column " << i % shape.cols;
    break;
  }
  return text.str();
}

}  // namespace

template <class T>
Inspection inspect(const DistortionShape& shape, const T* weight, const float* fisher,
                   const float* importance, float* range) {
  std::fill(range, range + shape.units(), 0.0f);
  Inspection result;
  if (shape.count() == 0) return result;
  const bool with_squares = shape.bit_grids() < static_cast<int64_t>(shape.grids.size());
  const int64_t part_rows = std::max<int64_t>(1, kPart / shape.cols);
  std::vector<Part> parts(static_cast<size_t>((shape.rows + part_rows - 1) / part_rows));
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (part_rows * shape.cols));
  parallel_for(static_cast<int64_t>(parts.size()), grain, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      for (int64_t p = first; p < last; ++p) {
        Part part;
        const int64_t begin = p * part_rows * shape.cols;
        const int64_t end = std::min((p + 1) * part_rows, shape.rows) * shape.cols;
        for_each_run(shape, begin, end,
                     [&](int64_t unit, int64_t from, int64_t to) __attribute__((always_inline)) {
                       const uint32_t max = max_magnitude(weight + from, to - from);
                       if (shape.group >= 0) range[unit] = float_of_bits(max);
                       part.weight = std::max(part.weight, max);
                     });
        if (with_squares) part.sum_squares = sum<2>(weight + begin, end - begin);
        if (fisher != nullptr) {
          part.fisher = max_pattern(fisher + begin, end - begin);
          part.sum_fisher = sum<1>(fisher + begin, end - begin);
        }
        if (importance != nullptr) part.given = max_pattern(importance + begin, end - begin);
        parts[static_cast<size_t>(p)] = part;
      }
    });
  });
  Part all;
  for (const Part& part : parts) {
    all.weight = std::max(all.weight, part.weight);
    all.fisher = std::max(all.fisher, part.fisher);
    all.given = std::max(all.given, part.given);
    all.sum_fisher += part.sum_fisher;
    all.sum_squares += part.sum_squares;
  }
  if (all.weight >= kInfinity || all.fisher >= kInfinity || all.given > kInfinity) {
    result.problem = first_problem(shape, weight, fisher, importance);
  }
  result.max_weight = float_of_bits(all.weight);
  result.max_fisher = float_of_bits(all.fisher);
  result.max_given = float_of_bits(all.given);
  result.sum_fisher = all.sum_fisher;
  result.sum_squares = all.sum_squares;
  if (shape.group < 0) range[0] = result.max_weight;
  return result;
}

template Inspection inspect<float>(const DistortionShape&, const float*, const float*, const float*,
                                   float*);
template Inspection inspect<BFloat16>(const DistortionShape&, const BFloat16*, const float*,
                                      const float*, float*);
template Inspection inspect<Float16>(const DistortionShape&, const Float16*, const float*,
                                     const float*, float*);

}  // namespace fitcompress
