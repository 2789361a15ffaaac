// The operands of the Fisher kernels on CUDA: both tensors as positions × columns, and tables of
// the offsets of these.
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

// Whether every sum is.
inline bool is_empty(const WeightGradShape& shape) {
  return shape.samples == 0 || shape.outputs == 0 || shape.inputs() == 0 || shape.positions() == 0;
}

// Offsets in tables are smaller, so that the sum of two is never negative, and the sum with this
// is.
constexpr int32_t kOutside = -(1 << 30);

// Elements in the 16 bytes that are copied at once.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// A tensor whose columns are contiguous in chunks. Those of the output's gradient are the outputs;
// those of the input are k · C' + c for kernel offset k and channel c, with the channels padded to
// C', a multiple of the chunk. What is padded is zero.
template <class T>
struct Operand {
  const T* data;             // aligned to 16 bytes
  int64_t sample, group;     // distances, in elements
  const int32_t* positions;  // offset of each position of a sample, in chunks
  const int32_t* columns;    // offset of each chunk of columns, in chunks
  int width;                 // number of columns
};

template <class T>
struct Operands {
  Operand<T> grad, input;
  int positions;        // of a sample
  int padded_channels;  // C'
};

// Uses the tensors where they are, if their channels are last and aligned, else a copy.
template <class T>
Operands<T> make_operands(const WeightGradShape& shape, const T* output_grad, const T* input,
                          const Scratch& scratch, cudaStream_t queue);

// For kernels that read the tensors as they are: offsets of the positions of a sample and of the
// inputs of the weight, (c, k).
struct Offsets {
  const int64_t *grad_positions, *input_positions, *inputs;
};
Offsets make_offsets(const WeightGradShape& shape, const Scratch& scratch, cudaStream_t queue);

}  // namespace fitcompress
