// Samples of a single position, as of a linear layer behind a pooling.
#pragma once

#include "common/cuda.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

inline bool has_single_position(const WeightGradShape& shape) {
  return shape.images * shape.positions() == 1;
}

// There G_b[o, i] = e[b, o] a[b, i], so Σ_b G_b² is one matrix product over the samples, of the
// squares. These as a linear map's tensors, 16 samples taken for one that has 16 images.
struct Squares {
  WeightGradShape shape;
  const float *output_grad, *input;
};

template <class T>
Squares make_squares(const WeightGradShape& shape, const T* output_grad, const T* input,
                     const Scratch& scratch, cudaStream_t queue);

}  // namespace fitcompress
