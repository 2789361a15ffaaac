// Squared norms of the per-sample gradients of 3×3 convolutions by minimal filtering.
#pragma once

#include "fisher/weight_grad.h"

namespace fitcompress {

// norms[b] += scale · ‖G_b‖² for a kernel of (1, 3, 3), stride and dilation 1, one group and
// places of depth 1.
void winograd_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                        double scale, double* norms);

}  // namespace fitcompress
