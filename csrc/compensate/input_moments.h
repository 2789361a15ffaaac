// Second moments of the inputs of a layer, and their products with its outputs: the normal
// equations of the least-squares problem that compensation solves.
#pragma once

#include <array>
#include <cstdint>

namespace fitcompress {

// A matrix [positions, features] for each group, read from a tensor by strides. A feature and a
// position are indices of four dimensions each, the last one fastest: channel and kernel offsets;
// sample and place.
struct StridedMatrix {
  const float* data;  // feature 0 at position 0 of group 0
  int64_t group_stride;
  std::array<int64_t, 4> feature_sizes, feature_strides;
  std::array<int64_t, 4> position_sizes, position_strides;
};

// With a the features of one position of `input` and a 1 after them, K + 1 numbers, and y those of
// `output`, for all groups and positions:
//   second[g] += Σ a aᵀ, [K + 1, K + 1];    cross[g] += Σ y aᵀ, [O, K + 1].
// Both results are contiguous. Sums over a tile of positions are float32, all others float64.
// `output` and `cross` may be null; position_sizes of both matrices are the same.
void input_moments_cpu(int64_t groups, const StridedMatrix& input, const StridedMatrix* output,
                       double* second, double* cross);

}  // namespace fitcompress
