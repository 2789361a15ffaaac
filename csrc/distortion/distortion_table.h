// What every grid costs at every sparsity, for one layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/scratch.h"

namespace fitcompress {

// One weight grid: codes of `bits` bits with an abs-max scale per row, or, if bits is 0, unbounded
// codes with one step Δ for the whole weight.
struct Grid {
  int64_t bits;
  double step;
};

struct DistortionShape {
  int64_t rows;
  int64_t cols;
  std::vector<Grid> grids;       // G
  std::vector<int64_t> dropped;  // weights dropped at each of the S sparsities, ascending
};

// G × S tables; prune_length and grid_length are squared lengths of steps to the neighbours.
struct DistortionTable {
  double* distortion;
  int64_t* nnz;
  double* entropy_bits;
  double* grid_length;
  double* prune_length;
  double* norm;
};

// Codes beyond this are no codes (and would need a histogram of that size).
constexpr double kLargestCode = 4194304.0;

// The largest code that a grid has for weights up to `max` in magnitude, and what to say if it is
// beyond kLargestCode.
double largest_code(const Grid& grid, float max);
std::string step_too_small(const Grid& grid, float max);

// T: float, BFloat16 or Float16. fisher may be null: 1 everywhere. Returns an empty text or what is
// wrong with the values.
template <class T>
std::string distortion_table_cpu(const DistortionShape& shape, const T* weight, const float* fisher,
                                 const float* importance, const DistortionTable& table);

// The same on a device; order: the indices of the weights, lowest importance first, ties by index.
// Waits for the result.
template <class T>
std::string distortion_table_cuda(const DistortionShape& shape, const T* weight,
                                  const float* fisher, const float* importance,
                                  const int64_t* order, const DistortionTable& table, int device,
                                  void* stream, const Scratch& scratch);

}  // namespace fitcompress
