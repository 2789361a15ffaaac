// Fused quantize-prune for training: ŵ = mask · Δ · clip(round(w / Δ), lo, hi), and its gradient.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/scratch.h"

namespace fitcompress {

// The weight as `rows` rows of `cols` consecutive elements, of which `width` have one Δ; the last
// ones of a row may be fewer. A single Δ for all is one row.
struct QuantizePruneShape {
  int64_t rows;
  int64_t cols;
  int64_t width;
  float min_code;  // lo and hi; infinite: codes are unbounded
  float max_code;
  bool regrow;  // masked weights receive gradients

  // A run of one Δ is cut into pieces of at most this many elements, each with a partial sum of its
  // own, so that sums do not depend on the number of threads.
  static constexpr int64_t kPiece = 8192;

  // At least one: without elements there still is a Δ.
  FITCOMPRESS_HOST_DEVICE int64_t runs_per_row() const {
    return cols == 0 ? 1 : (cols + width - 1) / width;
  }
  FITCOMPRESS_HOST_DEVICE int64_t pieces_per_run() const { return (width + kPiece - 1) / kPiece; }
  FITCOMPRESS_HOST_DEVICE int64_t runs() const { return rows * runs_per_row(); }
  FITCOMPRESS_HOST_DEVICE int64_t pieces() const { return runs() * pieces_per_run(); }
};

// mask: bit i % 8 of byte i / 8 keeps element i; null keeps all. scale: Δ of every run. T: float,
// BFloat16 or Float16.
template <class T>
void fake_quantize_prune_cpu(const QuantizePruneShape& shape, const T* weight, const float* scale,
                             const uint8_t* mask, T* result);

// Straight-through gradient of the weight, LSQ gradient of the scale.
template <class T>
void fake_quantize_prune_backward_cpu(const QuantizePruneShape& shape, const T* grad,
                                      const T* weight, const float* scale, const uint8_t* mask,
                                      T* grad_weight, float* grad_scale);

template <class T>
void fake_quantize_prune_cuda(const QuantizePruneShape& shape, const T* weight, const float* scale,
                              const uint8_t* mask, T* result, int device, void* stream);

template <class T>
void fake_quantize_prune_backward_cuda(const QuantizePruneShape& shape, const T* grad,
                                       const T* weight, const float* scale, const uint8_t* mask,
                                       T* grad_weight, float* grad_scale, int device, void* stream,
                                       const Scratch& scratch);

}  // namespace fitcompress
