// The first read of a layer: are the values numbers, and how large are they?
#pragma once

#include <cstdint>
#include <string>

#include "distortion/distortion_table.h"

namespace fitcompress {

struct Inspection {
  std::string problem;     // empty, or the first value that is not allowed
  float max_weight = 0;    // largest |w|
  float max_fisher = 0;    // largest F, 0 without a diagonal
  float max_given = 0;     // largest importance, 0 if none was given
  double sum_fisher = 0;   // Σ F
  double sum_squares = 0;  // Σ w², if there are grids with a step
};

// Also writes max |w| of every scale unit to range.
template <class T>
Inspection inspect(const DistortionShape& shape, const T* weight, const float* fisher,
                   const float* importance, float* range);

}  // namespace fitcompress
