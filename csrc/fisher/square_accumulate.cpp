// moment += Σ_b (E_bᵀ A_b)∘² on the CPU: a blocked matrix product whose epilogue squares and adds,
// so that no per-sample gradient leaves the cache.
//
// A task owns kOutputs × kInputs elements of the moment and runs through all samples and positions:
// positions in blocks of kPositions, whose columns are first copied (and widened to float32) into
// two panels; then tiles of 4 outputs × 2 vectors of inputs are kept in registers over the block.
// Every element is summed in one fixed order, whatever the number of threads. Read: the panels of E
// once per kInputs columns of A and the other way round. Bound: B·P·O·I multiply-adds.
#include "fisher/square_accumulate.h"

#include <algorithm>
#include <cstring>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace fitcompress {
namespace {

constexpr int64_t kOutputs = 32;
constexpr int64_t kInputs = 128;
constexpr int64_t kPositions = 128;

struct Scratch {
  alignas(64) float errors[kPositions * kOutputs];      // block of E, zero beyond the matrix
  alignas(64) float activations[kPositions * kInputs];  // block of A, likewise
  alignas(64) float product[kOutputs * kInputs];        // E_bᵀ A_b so far
  alignas(64) double total[kOutputs * kInputs];         // Σ_b of its squares
};

// Copies rows × count elements into rows of `width` floats and fills up with zeros.
template <class T>
FITCOMPRESS_INLINE void pack(const T* source, int64_t stride, int64_t rows, int64_t count,
                             int64_t width, float* panel) {
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t c = 0; c < count; ++c) panel[p * width + c] = to_float(source[p * stride + c]);
    for (int64_t c = count; c < width; ++c) panel[p * width + c] = 0.0f;
  }
}

// product[0..4)[0..2 vectors) += Σ_p errors[p][·] · activations[p][·].
template <int Lanes>
FITCOMPRESS_INLINE void multiply_tile(const float* errors, const float* activations, int64_t rows,
                                      float* product) {
  typedef float Vector __attribute__((vector_size(Lanes * sizeof(float)), may_alias));
  const auto at = [&](int o, int v) __attribute__((always_inline)) {
    return reinterpret_cast<Vector*>(product + o * kInputs + v * Lanes);
  };
  Vector s00 = *at(0, 0), s01 = *at(0, 1), s10 = *at(1, 0), s11 = *at(1, 1);
  Vector s20 = *at(2, 0), s21 = *at(2, 1), s30 = *at(3, 0), s31 = *at(3, 1);
  for (int64_t p = 0; p < rows; ++p) {
    const Vector* const a = reinterpret_cast<const Vector*>(activations + p * kInputs);
    const float* const e = errors + p * kOutputs;
    const Vector a0 = a[0], a1 = a[1];
    s00 += e[0] * a0, s01 += e[0] * a1;
    s10 += e[1] * a0, s11 += e[1] * a1;
    s20 += e[2] * a0, s21 += e[2] * a1;
    s30 += e[3] * a0, s31 += e[3] * a1;
  }
  *at(0, 0) = s00, *at(0, 1) = s01, *at(1, 0) = s10, *at(1, 1) = s11;
  *at(2, 0) = s20, *at(2, 1) = s21, *at(3, 0) = s30, *at(3, 1) = s31;
}

template <int Lanes, class T, class Moment>
FITCOMPRESS_INLINE void accumulate_block(const SquareAccumulateShape& shape, const T* output_grad,
                                         const T* input, Moment* moment, int64_t output,
                                         int64_t first_input, Scratch* scratch) {
  const int64_t outputs = std::min(kOutputs, shape.outputs - output);
  const int64_t inputs = std::min(kInputs, shape.inputs - first_input);
  std::memset(scratch->total, 0, sizeof(scratch->total));
  for (int64_t b = 0; b < shape.samples; ++b) {
    const T* const e = output_grad + b * shape.positions * shape.outputs + output;
    const T* const a = input + b * shape.positions * shape.inputs + first_input;
    std::memset(scratch->product, 0, sizeof(scratch->product));
    for (int64_t p = 0; p < shape.positions; p += kPositions) {
      const int64_t rows = std::min(kPositions, shape.positions - p);
      pack(e + p * shape.outputs, shape.outputs, rows, outputs, kOutputs, scratch->errors);
      pack(a + p * shape.inputs, shape.inputs, rows, inputs, kInputs, scratch->activations);
      for (int64_t i = 0; i < inputs; i += 2 * Lanes) {
        for (int64_t o = 0; o < outputs; o += 4) {
          multiply_tile<Lanes>(scratch->errors + o, scratch->activations + i, rows,
                               scratch->product + o * kInputs + i);
        }
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const float* const product = scratch->product + o * kInputs;
      double* const total = scratch->total + o * kInputs;
      for (int64_t i = 0; i < inputs; ++i) total[i] += double(product[i]) * product[i];
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    Moment* const row = moment + (output + o) * shape.inputs + first_input;
    const double* const total = scratch->total + o * kInputs;
    for (int64_t i = 0; i < inputs; ++i) row[i] = static_cast<Moment>(row[i] + total[i]);
  }
}

}  // namespace

template <class T, class Moment>
void square_accumulate_cpu(SquareAccumulateShape shape, const T* output_grad, const T* input,
                           Moment* moment) {
  const int64_t output_blocks = (shape.outputs + kOutputs - 1) / kOutputs;
  const int64_t input_blocks = (shape.inputs + kInputs - 1) / kInputs;
  parallel_for(output_blocks * input_blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    Scratch* const mine = &scratch;
    dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
      for (int64_t task = begin; task < end; ++task) {
        accumulate_block<lanes>(shape, output_grad, input, moment, task % output_blocks * kOutputs,
                                task / output_blocks * kInputs, mine);
      }
    });
  });
}

#define INSTANTIATE(T)                                                                      \
  template void square_accumulate_cpu<T, float>(SquareAccumulateShape, const T*, const T*,  \
                                                float*);                                    \
  template void square_accumulate_cpu<T, double>(SquareAccumulateShape, const T*, const T*, \
                                                 double*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
