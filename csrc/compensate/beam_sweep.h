// The error-feedback sweep as a search: each row keeps several partial rows, and a code may be
// chosen for its bits as well (M-algorithm, Anderson and Mohan 1984).
#pragma once

#include <cstdint>

#include "common/scratch.h"
#include "compensate/error_feedback_sweep.h"

namespace fitcompress {

struct BeamSweep {
  SweepShape shape;
  int64_t beam;        // most partial rows that are kept, the paths
  double rate;         // λ ≥ 0
  const double* bits;  // bits[k] for |k| ≤ max_code, which is finite then; unused if λ = 0
};

// At column j, a path with weights w and cost c proposes codes k for x = w_j / Δ, where duplicates
// and |k| > max_code are left out: k0 = clip(round(x)); k0 ± 1 on the side of x, k0 − 1 if x = k0;
// and if λ > 0, k0 one step towards 0, and 0. It proposes only 0 if masked or Δ ≤ 0. A proposal
// costs c + (e² + λΔ² bits[k]), e = (w_j − kΔ) / U_jj. The cheapest become the new paths, in order
// of cost, ties in order of path, then proposal; w_j' −= e U_jj' for j' > j. The codes of the
// cheapest path are returned. Returns false if a code is not finite or does not fit in 32 bits, or
// a cost is not finite.
bool beam_sweep_cpu(const BeamSweep& sweep, const double* weight, const double* factor,
                    const double* scale, const uint8_t* mask, int32_t* codes);

// The same on the device; waits for the result.
bool beam_sweep_cuda(const BeamSweep& sweep, const double* weight, const double* factor,
                     const double* scale, const uint8_t* mask, int32_t* codes, int device,
                     void* stream, const Scratch& scratch);

}  // namespace fitcompress
