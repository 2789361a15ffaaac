// Quantization of a weight matrix column by column, each column's error spread over the later ones
// through the Cholesky factor of the inverse second moments (OBS, OBC, GPTQ).
#pragma once

#include <cstdint>

#include "common/scratch.h"

namespace fitcompress {

struct SweepShape {
  int64_t rows;
  int64_t cols;
  bool scale_per_row;  // else one Δ for all rows
  double max_code;     // q; infinity: codes are unbounded
};

// For j = 0 … cols−1: k = clip(round(w_j / Δ)), 0 if masked or Δ ≤ 0;
// w_j' −= (w_j − k Δ) / U_jj · U_jj' for all j' > j. All matrices contiguous, mask and scale as in
// the op; mask may be null. `work` holds a copy of the weight and is overwritten. Returns false if
// a code was not finite or does not fit in 32 bits.
bool error_feedback_sweep_cpu(SweepShape shape, double* work, const double* factor,
                              const double* scale, const uint8_t* mask, int32_t* codes);

// The same on the device; waits for the result.
bool error_feedback_sweep_cuda(SweepShape shape, double* work, const double* factor,
                               const double* scale, const uint8_t* mask, int32_t* codes, int device,
                               void* stream, const Scratch& scratch);

}  // namespace fitcompress
