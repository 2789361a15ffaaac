// The Fisher diagonal of one layer: a matrix product per sample whose result is squared and added.
#pragma once

#include <cstdint>

namespace fitcompress {

struct SquareAccumulateShape {
  int64_t samples;    // B
  int64_t positions;  // P
  int64_t outputs;    // O
  int64_t inputs;     // I
};

// moment[o, i] += Σ_b (Σ_p output_grad[b, p, o] · input[b, p, i])², all contiguous. The inner sum
// is float32, the outer float64. T: float, BFloat16 or Float16; Moment: float or double.
template <class T, class Moment>
void square_accumulate_cpu(SquareAccumulateShape shape, const T* output_grad, const T* input,
                           Moment* moment);

template <class T, class Moment>
void square_accumulate_cuda(SquareAccumulateShape shape, const T* output_grad, const T* input,
                            Moment* moment, int device, void* stream);

}  // namespace fitcompress
