// Squared weight gradients of groups with few weights beside their kernel, as in depthwise
// convolutions.
#pragma once

#include "common/cuda.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

// As square_accumulate_cuda, for any shape that is not empty.
template <class T, class Moment>
void square_few(const WeightGradShape& shape, const T* output_grad, const T* input, double scale,
                Moment* moment, double* norms, const Scratch& scratch, cudaStream_t queue);

}  // namespace fitcompress
