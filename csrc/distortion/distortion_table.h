// What every grid costs at every sparsity, for one layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/scratch.h"

namespace fitcompress {

// One weight grid: codes of `bits` bits, scaled to the range of a scale unit, or, if bits is 0,
// unbounded codes with one step Δ for the whole weight.
struct Grid {
  int64_t bits;
  double step;
};

// The rules of `python/fitcompress/ops/distortion.py`, in numbers. `group` columns share a scale:
// 0 stands for the whole row, -1 for the whole weight.
struct DistortionShape {
  int64_t rows;
  int64_t cols;
  std::vector<Grid> grids;       // G: the B with bits first, then those with a step
  std::vector<int64_t> dropped;  // weights dropped at each of the S sparsities, ascending
  std::vector<float> clips;      // candidates for the share of the range, in (0, 1]
  double smoothing;              // κ; infinity for the magnitude as importance
  int64_t group;
  float dead_zone;  // codes of a step are 0 below dead_zone·Δ

  int64_t count() const { return rows * cols; }
  int64_t bit_grids() const;
  int64_t units() const;  // U, the number of scale units
};

// G × S tables; prune_length and grid_length are squared lengths of steps to the neighbours.
struct DistortionTable {
  double* distortion;
  int64_t* nnz;
  double* entropy_bits;
  double* grid_length;
  double* prune_length;
  double* norm;
  float* threshold;   // S: importance of the first weight that stays
  int64_t* position;  // S: its flat index
  float* offset;      // 1: what the importance adds to the Fisher diagonal
  float* clip;        // B × U
  float* range;       // U: max |w|
};

// Codes beyond this are no codes.
constexpr double kLargestCode = 1048576.0;

// The largest code that a grid has for weights up to `max` in magnitude, and what to say if it is
// beyond kLargestCode.
double largest_code(const Grid& grid, float max);
std::string step_too_small(const Grid& grid, float max);

// What to say if (F + offset)·w² may be beyond float32 for values up to these; else nothing.
std::string importance_too_large(float max_weight, float max_fisher, float offset);

// T: float, BFloat16 or Float16. fisher may be null: 1 everywhere. importance may be null: then it
// is |w|, or (F + offset)·w² with offset = κ·mean F if there is a diagonal and κ is finite. Returns
// an empty text or what is wrong with the values.
template <class T>
std::string distortion_table_cpu(const DistortionShape& shape, const T* weight, const float* fisher,
                                 const float* importance, const DistortionTable& table);

// The same on a device, where all pointers point. Waits for the result.
template <class T>
std::string distortion_table_cuda(const DistortionShape& shape, const T* weight,
                                  const float* fisher, const float* importance,
                                  const DistortionTable& table, int device, void* stream,
                                  const Scratch& scratch);

}  // namespace fitcompress
