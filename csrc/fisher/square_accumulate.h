// Sums of squared per-sample weight gradients, from the gradients themselves.
#pragma once

#include "common/scratch.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

// moment[g, o, i] += scale · Σ_b G_b[g, o, i]²  and  norms[b] += scale · ‖G_b‖², either may be
// null. moment is contiguous [groups, outputs, inputs], Moment float or double. No gradient is
// stored as a whole.
template <class Moment>
void square_accumulate_cpu(const WeightGradShape& shape, const float* output_grad,
                           const float* input, double scale, Moment* moment, double* norms);

// T is float, BFloat16 or Float16.
template <class T, class Moment>
void square_accumulate_cuda(const WeightGradShape& shape, const T* output_grad, const T* input,
                            double scale, Moment* moment, double* norms, const Scratch& scratch,
                            int device, void* stream);

}  // namespace fitcompress
