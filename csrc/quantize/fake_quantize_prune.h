// Fused quantize-prune for training: ŵ = mask · Δ · clip(round(w / Δ), −q, q), and its gradient.
#pragma once

#include <cstdint>

#include "common/scratch.h"

namespace fitcompress {

// The weight as `rows` runs of `cols` consecutive elements, each with its own Δ; one run for a
// scale of one element.
struct QuantizePruneShape {
  int64_t rows;
  int64_t cols;
  float max_code;  // q; infinity: codes are unbounded
};

// mask: bit i % 8 of byte i / 8 keeps element i; null keeps all. T: float, BFloat16 or Float16.
template <class T>
void fake_quantize_prune_cpu(QuantizePruneShape shape, const T* weight, const float* scale,
                             const uint8_t* mask, T* result);

// Straight-through gradient of the weight, LSQ gradient of the scale.
template <class T>
void fake_quantize_prune_backward_cpu(QuantizePruneShape shape, const T* grad, const T* weight,
                                      const float* scale, const uint8_t* mask, T* grad_weight,
                                      float* grad_scale);

template <class T>
void fake_quantize_prune_cuda(QuantizePruneShape shape, const T* weight, const float* scale,
                              const uint8_t* mask, T* result, int device, void* stream);

template <class T>
void fake_quantize_prune_backward_cuda(QuantizePruneShape shape, const T* grad, const T* weight,
                                       const float* scale, const uint8_t* mask, T* grad_weight,
                                       float* grad_scale, int device, void* stream,
                                       const Scratch& scratch);

// A row is cut into pieces of this many elements, each with a partial sum of its own, so that sums
// do not depend on the number of threads.
constexpr int64_t kQuantizePiece = 8192;

inline int64_t pieces_per_row(int64_t cols) { return (cols + kQuantizePiece - 1) / kQuantizePiece; }

}  // namespace fitcompress
