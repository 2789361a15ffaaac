// Squared norms of per-sample weight gradients, without the gradients: from the products of the
// positions of a sample with each other.
#pragma once

#include "common/scratch.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

// norms[b] += scale · ‖G_b‖², with
//
//   ‖G_b‖² = Σ_{p,q} (Σ_o e[o, p] e[o, q]) (Σ_k Σ_c x[c, s p + d k] x[c, s q + d k])
//
// over all pairs of positions of the sample (and the groups).
void ghost_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                     double scale, double* norms);

// T is float, BFloat16 or Float16.
template <class T>
void ghost_norms_cuda(const WeightGradShape& shape, const T* output_grad, const T* input,
                      double scale, double* norms, const Scratch& scratch, int device,
                      void* stream);

}  // namespace fitcompress
