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
//
// What it costs, for each sample and group, in multiply-adds at the rate of a matrix product, to
// choose between this form and the gradients themselves, which take P O I. With P the positions of
// a sample, K the offsets of the kernel, and T(n) = ½ m (m + 16), m being n rounded up to a
// multiple of 16:
//
//   T(P) O + Σ_v T(v) C             products of outputs, and of inputs for each part
//   + 10 (P O + Σ_v v C)            packing
//   + 3 K · ½ P P'                  contraction
//   + 750 (P + parts P + Σ_v v)     rows of the matrices
//   + 45000 (1 + parts)             lists of places
//
// A dimension has as many parts as the remainders of d k by s are, at most s: one for a stride of 1
// or a kernel of 1. v are the places of a part that some position reads and that are no padding:
// all of the unpadded input with a stride of 1, about 1/s of each dimension else. P' is P times
// (W' + shift) / W', W' the places in width and shift the largest of a part: ⌊d (k − 1) / s⌋.
// Fitted to 450 layers on a Zen 4 core: half of them are within 10 %, nine in ten within 23 %.
void ghost_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                     double scale, double* norms);

// T is float, BFloat16 or Float16.
template <class T>
void ghost_norms_cuda(const WeightGradShape& shape, const T* output_grad, const T* input,
                      double scale, double* norms, const Scratch& scratch, int device,
                      void* stream);

}  // namespace fitcompress
