// What every grid costs at every sparsity, for one layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// T: float, BFloat16 or Float16. fisher may be null: 1 everywhere. Returns an empty text or what is
// wrong with the values.
template <class T>
std::string distortion_table_cpu(const DistortionShape& shape, const T* weight, const float* fisher,
                                 const float* importance, const DistortionTable& table);

}  // namespace fitcompress
