// Distortion table on the CPU: no sort, one pass over the weights per grid for all sparsities.
//
// Masks are nested, so S sparsities cut the weights into S + 1 classes: class k leaves first at
// sparsity k, class S never. Weights, Fisher values and row maxima are copied class by class. Then
// every grid is one task: one read of the copy (12 bytes a weight) for the sums of each class, and
// a histogram of codes that grows class by class, last class first, from which nnz and entropy
// follow. Cells are sums over classes. A task's order of summation is fixed, hence the result does
// not depend on the number of threads. Bound: a few divisions and one histogram update per weight
// and grid.
#include "distortion/distortion_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <sstream>

#include "common/buffer.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "distortion/partition.h"

namespace fitcompress {
namespace {

constexpr int64_t kChunks = 16;
constexpr int64_t kBlock = 256;
constexpr int kSums = 16;
constexpr uint32_t kInfinity = 0x7f800000u;

// The weights class by class; class k is [begin[k], begin[k + 1]).
struct Sorted {
  Buffer<float> weight, fisher, row_max;
  std::vector<int64_t> begin;
  std::vector<double> pruned;  // Σ F θ² of each class
  float max;                   // largest |θ|
};

// Sums over one class for one grid.
struct ClassSums {
  double error = 0, norm = 0, to_next = 0;  // Σ F(θ − θ̂)², Σ F θ̂², Σ F(θ̂ − θ̂ of the next grid)²
  double code_bits = 0;                     // entropy bits of this class and all later ones
  int64_t nonzero = 0;                      // likewise
};

// Σ in kSums fixed partial sums, which vectorise without reordering.
struct LaneSum {
  double lane[kSums] = {};
  FITCOMPRESS_INLINE void add(const float* terms) {
    for (int i = 0; i < kSums; ++i) lane[i] += terms[i];
  }
  FITCOMPRESS_INLINE double total() const {
    double sum = 0;
    for (const double part : lane) sum += part;
    return sum;
  }
};

// A grid as the inner loop wants it: Δ = row_max / divisor + step, one of the two terms being 0.
struct Quantizer {
  float divisor, step, max_code;
  explicit Quantizer(const Grid& grid)
      : divisor(grid.bits > 0 ? static_cast<float>((int64_t{1} << (grid.bits - 1)) - 1) : INFINITY),
        step(static_cast<float>(grid.step)),
        max_code(grid.bits > 0 ? divisor : INFINITY) {}
  FITCOMPRESS_INLINE float delta(float row_max) const { return row_max / divisor + step; }
  FITCOMPRESS_INLINE float code(float weight, float delta) const {
    float code = round_even(weight / delta);
    code = code < -max_code ? -max_code : code;
    code = code > max_code ? max_code : code;
    return delta > 0.0f ? code : 0.0f;
  }
};

// ---- Checks and row maxima ----------------------------------------------------------------------

// The largest bit pattern of |x|, which orders like |x| and puts what is not finite at the top.
template <class T>
FITCOMPRESS_INLINE uint32_t max_pattern(const T* values, int64_t count) {
  uint32_t max = 0;
  for (int64_t i = 0; i < count; ++i) {
    max = std::max(max, bits_of_float(to_float(values[i])) & 0x7fffffffu);
  }
  return max;
}

// Whether all values are ≥ 0 and at most `limit`, a bit pattern.
FITCOMPRESS_INLINE bool within(const float* values, int64_t count, uint32_t limit) {
  uint32_t max = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of_float(values[i]);
    max = std::max(max, bits == 0x80000000u ? 0 : bits);
  }
  return max <= limit;
}

template <class T>
std::string check_values(const DistortionShape& shape, const T* weight, const float* fisher,
                         const float* importance, float* row_max) {
  std::atomic<bool> ok{true};
  parallel_for(shape.rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(shape.cols, 1)),
               [&](int64_t first, int64_t last) {
                 dispatch_isa([&](auto) __attribute__((always_inline)) {
                   for (int64_t row = first; row < last; ++row) {
                     const int64_t at = row * shape.cols;
                     const uint32_t max = max_pattern(weight + at, shape.cols);
                     row_max[row] = float_of_bits(max);
                     if (max >= kInfinity || !within(importance + at, shape.cols, kInfinity) ||
                         (fisher != nullptr && !within(fisher + at, shape.cols, kInfinity - 1))) {
                       ok = false;
                     }
                   }
                 });
               });
  if (ok) return {};
  std::ostringstream text;
  for (int64_t i = 0; i < shape.rows * shape.cols; ++i) {
    if (!std::isfinite(to_float(weight[i]))) {
      text << "weight must be finite, got " << to_float(weight[i]);
    } else if (!(importance[i] >= 0)) {
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

// ---- The copy, class by class -------------------------------------------------------------------

template <class T>
Sorted sort_by_class(const DistortionShape& shape, const T* weight, const float* fisher,
                     const float* importance, const std::vector<float>& row_max) {
  const int64_t count = shape.rows * shape.cols;
  const size_t classes = shape.dropped.size() + 1;
  const Buffer<uint16_t> class_of = make_buffer<uint16_t>(count);
  classify_by_importance(importance, count, shape.dropped, class_of.get());

  // Where each chunk writes its part of each class.
  const int64_t chunk = std::max<int64_t>((count + kChunks - 1) / kChunks, 1);
  std::vector<std::vector<int64_t>> cursor(kChunks, std::vector<int64_t>(classes, 0));
  parallel_for(kChunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t* const counts = cursor[static_cast<size_t>(c)].data();
      const int64_t end = std::min((c + 1) * chunk, count);
      for (int64_t i = c * chunk; i < end; ++i) ++counts[class_of[static_cast<size_t>(i)]];
    }
  });
  Sorted sorted;
  sorted.max = row_max.empty() ? 0.0f : *std::max_element(row_max.begin(), row_max.end());
  sorted.weight = make_buffer<float>(count);
  sorted.fisher = make_buffer<float>(count);
  sorted.row_max = make_buffer<float>(count);
  int64_t place = 0;
  for (size_t k = 0; k < classes; ++k) {
    sorted.begin.push_back(place);
    for (auto& counts : cursor) place += std::exchange(counts[k], place);
  }
  sorted.begin.push_back(place);

  parallel_for(kChunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t* const next = cursor[static_cast<size_t>(c)].data();
      const int64_t end = std::min((c + 1) * chunk, count);
      for (int64_t i = c * chunk; i < end;) {
        const int64_t row = i / shape.cols;
        const float max = row_max[static_cast<size_t>(row)];
        for (const int64_t row_end = std::min(end, (row + 1) * shape.cols); i < row_end; ++i) {
          const auto to = static_cast<size_t>(next[class_of[static_cast<size_t>(i)]]++);
          sorted.weight[to] = to_float(weight[i]);
          sorted.fisher[to] = fisher == nullptr ? 1.0f : fisher[i];
          sorted.row_max[to] = max;
        }
      }
    }
  });
  return sorted;
}

// ---- One grid -----------------------------------------------------------------------------------

// Counts of codes. Where that is cheap, kWays counters a code take turns: adding to the same one
// again and again would make each addition wait for the last.
struct Histogram {
  static constexpr int64_t kWays = 4;
  int64_t largest, ways;
  std::vector<int64_t> counts;

  explicit Histogram(int64_t largest_code)
      : largest(largest_code),
        ways(largest_code < (1 << 15) ? kWays : 1),
        counts(static_cast<size_t>((2 * largest_code + 1) * ways), 0) {}
  FITCOMPRESS_INLINE void add(const int32_t* codes, int64_t count) {
    int64_t* const zero = counts.data() + largest * ways;
    if (ways == kWays) {
      for (int64_t j = 0; j < count; ++j) ++zero[codes[j] * kWays + j % kWays];
    } else {
      for (int64_t j = 0; j < count; ++j) ++zero[codes[j]];
    }
  }
  int64_t operator[](int64_t code) const {
    const int64_t* const first = counts.data() + (code + largest) * ways;
    return std::accumulate(first, first + ways, int64_t{0});
  }
};

// Adds the elements [begin, end) to a class's sums, and their codes to the histogram.
FITCOMPRESS_INLINE void add_class(const Sorted& sorted, int64_t begin, int64_t end,
                                  const Quantizer& grid, const Quantizer& next,
                                  Histogram* histogram, ClassSums* sums) {
  LaneSum error, norm, to_next;
  float error_terms[kBlock], norm_terms[kBlock], next_terms[kBlock];
  int32_t codes[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = std::min(kBlock, end - i);
    const float* const w = sorted.weight.get() + i;
    const float* const f = sorted.fisher.get() + i;
    const float* const m = sorted.row_max.get() + i;
    for (int64_t j = 0; j < count; ++j) {
      const float delta = grid.delta(m[j]);
      const float code = grid.code(w[j], delta);
      const float value = code * delta;
      const float next_delta = next.delta(m[j]);
      const float step = value - next.code(w[j], next_delta) * next_delta;
      codes[j] = static_cast<int32_t>(code);
      error_terms[j] = f[j] * ((w[j] - value) * (w[j] - value));
      norm_terms[j] = f[j] * (value * value);
      next_terms[j] = f[j] * (step * step);
    }
    histogram->add(codes, count);
    const int64_t padded = (count + kSums - 1) / kSums * kSums;
    for (int64_t j = count; j < padded; ++j) error_terms[j] = norm_terms[j] = next_terms[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += kSums) {
      error.add(error_terms + j);
      norm.add(norm_terms + j);
      to_next.add(next_terms + j);
    }
  }
  sums->error = error.total();
  sums->norm = norm.total();
  sums->to_next = to_next.total();
}

// n·H = n log n − Σ c log c over the kept codes in the histogram and n − kept masked zeros.
void count_codes(const Histogram& histogram, int64_t count, ClassSums* sums) {
  const auto term = [](int64_t c) {
    return c > 1 ? static_cast<double>(c) * std::log2(static_cast<double>(c)) : 0.0;
  };
  double total = 0;
  int64_t nonzero = 0;
  for (int64_t code = -histogram.largest; code <= histogram.largest; ++code) {
    if (code == 0) continue;
    const int64_t with_code = histogram[code];
    nonzero += with_code;
    total += term(with_code);
  }
  sums->nonzero = nonzero;
  sums->code_bits = std::max(0.0, term(count) - (total + term(count - nonzero)));
}

void sum_grid(const Sorted& sorted, const Grid& grid, const Grid& next, Histogram* histogram,
              std::vector<ClassSums>* sums) {
  const Quantizer quantizer(grid), next_quantizer(next);
  for (size_t k = sums->size(); k-- > 0;) {
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      add_class(sorted, sorted.begin[k], sorted.begin[k + 1], quantizer, next_quantizer, histogram,
                &(*sums)[k]);
    });
    if (k > 0) count_codes(*histogram, sorted.begin.back(), &(*sums)[k]);
  }
}

// What pruning a class costs, whatever the grid.
void sum_pruned(Sorted* sorted) {
  const auto classes = static_cast<int64_t>(sorted->begin.size()) - 1;
  sorted->pruned.assign(static_cast<size_t>(classes), 0.0);
  parallel_for(classes, 1, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      for (auto k = static_cast<size_t>(first); k < static_cast<size_t>(last); ++k) {
        LaneSum sum;
        for (int64_t i = sorted->begin[k]; i < sorted->begin[k + 1]; i += kSums) {
          float terms[kSums] = {};
          const int64_t count = std::min<int64_t>(kSums, sorted->begin[k + 1] - i);
          for (int64_t j = 0; j < count; ++j) {
            const float w = sorted->weight[static_cast<size_t>(i + j)];
            terms[j] = sorted->fisher[static_cast<size_t>(i + j)] * (w * w);
          }
          sum.add(terms);
        }
        sorted->pruned[k] = sum.total();
      }
    });
  });
}

// Cells of one grid: at sparsity s the classes up to s are masked, those above are kept.
void fill_cells(const Sorted& sorted, const std::vector<ClassSums>& sums, size_t grid,
                const DistortionTable& table) {
  const size_t sparsities = sums.size() - 1;
  double pruned = 0, error = 0, norm = 0, to_next = 0;
  for (size_t s = 0; s < sparsities; ++s) {
    pruned += sorted.pruned[s];
    table.distortion[grid * sparsities + s] = 0.5 * pruned;
  }
  for (size_t s = sparsities; s-- > 0;) {
    const ClassSums& kept = sums[s + 1];
    const size_t cell = grid * sparsities + s;
    error += kept.error;
    norm += kept.norm;
    to_next += kept.to_next;
    table.distortion[cell] += 0.5 * error;
    table.norm[cell] = norm;
    table.grid_length[cell] = to_next;
    table.prune_length[cell] = s + 1 == sparsities ? 0.0 : kept.norm;
    table.nnz[cell] = kept.nonzero;
    table.entropy_bits[cell] = kept.code_bits;
  }
}

}  // namespace

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

template <class T>
std::string distortion_table_cpu(const DistortionShape& shape, const T* weight, const float* fisher,
                                 const float* importance, const DistortionTable& table) {
  std::vector<float> row_max(static_cast<size_t>(shape.rows), 0.0f);
  const std::string problem = check_values(shape, weight, fisher, importance, row_max.data());
  if (!problem.empty()) return problem;
  Sorted sorted = sort_by_class(shape, weight, fisher, importance, row_max);
  sum_pruned(&sorted);

  // Allocated here, because nothing may throw on another thread.
  const size_t grids = shape.grids.size();
  std::vector<Histogram> histograms;
  std::vector<std::vector<ClassSums>> sums(grids);
  for (size_t g = 0; g < grids; ++g) {
    const double largest = largest_code(shape.grids[g], sorted.max);
    if (largest > kLargestCode) return step_too_small(shape.grids[g], sorted.max);
    histograms.emplace_back(static_cast<int64_t>(largest));
    sums[g].resize(sorted.begin.size() - 1);
  }
  parallel_for(static_cast<int64_t>(grids), 1, [&](int64_t first, int64_t last) {
    for (auto g = static_cast<size_t>(first); g < static_cast<size_t>(last); ++g) {
      // The last grid is its own neighbour, at length 0.
      const Grid& next = shape.grids[std::min(g + 1, grids - 1)];
      sum_grid(sorted, shape.grids[g], next, &histograms[g], &sums[g]);
      fill_cells(sorted, sums[g], g, table);
    }
  });
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
