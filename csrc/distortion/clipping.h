// Fixed-point grids whose range is a share of max|w| that every scale unit chooses.
#pragma once

#include "distortion/cells.h"
#include "distortion/passes.h"
#include "distortion/slots.h"

namespace fitcompress {

// Writes the clips, [B, U]: in each unit and for each fixed-point grid the first of the candidates
// with the least Σ F (θ − θ̂)², up to rounding. Returns whether any candidate is not 1.
template <class T>
bool choose_clips(const Layer<T>& layer, float* clip);

// Adds the fixed-point grids with these clips to the sums, and what pruning costs.
template <class T>
void sum_clipped(const Layer<T>& layer, const float* clip, const PassPlan& plan, ClassSums* sums);

}  // namespace fitcompress
