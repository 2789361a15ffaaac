// ŵ = mask · Δ · clip(round(w / Δ), lo, hi) and its gradient on the CPU.
//
// A task is some pieces of runs with one Δ each. Sixteen elements are one step on every instruction
// set, whatever its vectors, so that sums are the same. Forward reads w and one bit an element and
// writes ŵ; backward reads w and the gradient and writes one tensor, in the same pass as the sum
// for Δ. Bound: memory, so a small multiple of a memcpy of the same bytes.
#include "quantize/fake_quantize_prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "common/vector_float.h"

namespace fitcompress {
namespace {

constexpr int kStep = 16;
constexpr int64_t kUnrolled = 64;       // elements whose mask is read at once
constexpr int64_t kFlush = 512;         // elements whose terms are summed in float32, 16 sums
constexpr float kMagic = 12582912.0f;   // 1.5 · 2^23: pushes the fraction out of the mantissa
constexpr float kMagicLimit = 4194303;  // for numbers up to 2^22
constexpr float kExact = 8388608.0f;    // 2^23: floats from here on are integers

// One step of elements in registers, for vectors of `Lanes` floats. (Functions take vectors by
// pointer: returning them would depend on the instruction set.)
template <int Lanes>
struct Step {
  static constexpr int kVectors = kStep / Lanes;
  using Floats = typename VectorOf<Lanes>::Type;
  using Ints = typename VectorOf<Lanes>::Indices;

  Floats part[kVectors];

  template <class T>
  FITCOMPRESS_INLINE void load(const T* from) {
    for (int v = 0; v < kVectors; ++v) VectorFloat<Lanes>::load(from + v * Lanes, &part[v]);
  }
  template <class T>
  FITCOMPRESS_INLINE void store(T* to) const {
    for (int v = 0; v < kVectors; ++v) VectorFloat<Lanes>::store(part[v], to + v * Lanes);
  }
  // 0 wherever the mask has a 0; bits: those of the step.
  FITCOMPRESS_INLINE void mask(uint32_t bits) {
    Ints one;
    for (int l = 0; l < Lanes; ++l) one[l] = 1 << l;
    for (int v = 0; v < kVectors; ++v) {
      const auto own = static_cast<int32_t>(bits >> (v * Lanes));
      part[v] = (one & own) != 0 ? part[v] : Floats{};
    }
  }
};

// The 16 bits of the mask from element `at` on; those beyond the end are 0.
FITCOMPRESS_INLINE uint32_t bits_at(const uint8_t* mask, int64_t at, int64_t bytes) {
  uint32_t bits = 0;
  const int64_t first = at / 8;
  if (first + 4 <= bytes) {
    std::memcpy(&bits, mask + first, 4);
  } else {
    for (int64_t i = first; i < bytes; ++i) bits |= uint32_t{mask[i]} << (8 * (i - first));
  }
  return bits >> (at % 8);
}

// The 64 bits from element `at` on, of which all are within the mask.
FITCOMPRESS_INLINE uint64_t many_bits_at(const uint8_t* mask, int64_t at, int64_t bytes) {
  uint64_t bits;
  const int64_t first = at / 8;
  std::memcpy(&bits, mask + first, 8);
  if (at % 8 == 0) return bits;
  const uint64_t next = first + 8 < bytes ? mask[first + 8] : 0;
  return (bits >> (at % 8)) | (next << (64 - at % 8));
}

// What is the same for all elements of a run. Codes with small bounds are clipped before they are
// rounded, in the backward pass to one beyond the bounds, so that it shows which are: then adding
// and subtracting one number rounds them.
struct Run {
  float delta, min_code, max_code;
  bool small;

  Run(const QuantizePruneShape& shape, float delta_)
      : delta(delta_),
        min_code(shape.min_code),
        max_code(shape.max_code),
        small(-min_code <= kMagicLimit && max_code <= kMagicLimit) {}
};

template <class Floats>
FITCOMPRESS_INLINE void clip(Floats* x, float low, float high) {  // NaN stays NaN
  *x = *x < low ? Floats{} + low : *x;
  *x = *x > high ? Floats{} + high : *x;
}

// Small: |x| is at most 2^22.
template <bool Small, class Floats>
FITCOMPRESS_INLINE void round_codes(Floats* x) {
  if constexpr (Small) {
    *x = (*x + kMagic) - kMagic;
  } else {  // as round_even
    const Floats shift = *x < 0.0f ? Floats{} - kExact : Floats{} + kExact;
    const Floats magnitude = *x < 0.0f ? -*x : *x;
    *x = (magnitude < kExact ? (*x + shift) - shift : *x) + 0.0f;
  }
}

template <bool Small, int Lanes>
FITCOMPRESS_INLINE void forward_step(const Run& run, Step<Lanes>* w) {
  for (auto& x : w->part) {
    x = x / run.delta;
    clip(&x, run.min_code, run.max_code);  // the bounds are integers
    round_codes<Small>(&x);
    x = x * run.delta;
  }
}

// g becomes the gradient of the weight but for the mask, and term what the elements add to that of
// Δ.
template <bool Small, int Lanes>
FITCOMPRESS_INLINE void backward_step(const Run& run, const Step<Lanes>& w, Step<Lanes>* g,
                                      Step<Lanes>* term) {
  using Floats = typename Step<Lanes>::Floats;
  for (int v = 0; v < Step<Lanes>::kVectors; ++v) {
    const Floats x = w.part[v] / run.delta;
    Floats code = x;
    if constexpr (Small) clip(&code, run.min_code - 1.0f, run.max_code + 1.0f);
    round_codes<Small>(&code);
    Floats clipped = code;
    clip(&clipped, run.min_code, run.max_code);
    const auto inside = clipped == code;
    term->part[v] = g->part[v] * (inside ? code - x : clipped);
    g->part[v] = inside ? g->part[v] : Floats{};
  }
}

// `count` elements as a step, 0 behind the end.
template <int Lanes, class T>
FITCOMPRESS_INLINE void load_step(const T* from, int64_t count, Step<Lanes>* step) {
  if (count >= kStep) return step->load(from);
  T padded[kStep] = {};
  for (int64_t j = 0; j < count; ++j) padded[j] = from[j];
  step->load(padded);
}

template <int Lanes, class T>
FITCOMPRESS_INLINE void store_step(const Step<Lanes>& step, int64_t count, T* to) {
  if (count >= kStep) return step.store(to);
  T padded[kStep];
  step.store(padded);
  for (int64_t j = 0; j < count; ++j) to[j] = padded[j];
}

// Calls body(lanes, piece, run, begin, end) for every piece of every run, in parallel.
template <class Body>
void for_each_piece(const QuantizePruneShape& shape, Body body) {
  const int64_t per_run = shape.pieces_per_run();
  const int64_t per_row = shape.runs_per_row() * per_run;
  const int64_t length = std::min(shape.width, QuantizePruneShape::kPiece);
  const int64_t grain = std::max<int64_t>(1, 2 * QuantizePruneShape::kPiece / length);
  parallel_for(shape.rows * per_row, grain, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
      int64_t row = first / per_row, run_in_row = first % per_row / per_run;
      int64_t piece_in_run = first % per_run;
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t run_begin = row * shape.cols + run_in_row * shape.width;
        const int64_t run_end = std::min(run_begin + shape.width, (row + 1) * shape.cols);
        const int64_t begin = run_begin + piece_in_run * QuantizePruneShape::kPiece;
        const int64_t end = std::min(begin + QuantizePruneShape::kPiece, run_end);
        body(lanes, piece, row * shape.runs_per_row() + run_in_row, begin, end);
        if (++piece_in_run < per_run) continue;
        piece_in_run = 0;
        if (++run_in_row < shape.runs_per_row()) continue;
        run_in_row = 0;
        ++row;
      }
    });
  });
}

template <bool Small, int Lanes, class T>
FITCOMPRESS_INLINE void forward_piece(const Run& run, const uint8_t* mask, int64_t mask_bytes,
                                      const T* weight, int64_t begin, int64_t end, T* result) {
  Step<Lanes> step;
  int64_t i = begin;
  for (; i + kUnrolled <= end; i += kUnrolled) {
    const uint64_t bits = mask == nullptr ? 0 : many_bits_at(mask, i, mask_bytes);
    for (int u = 0; u < kUnrolled / kStep; ++u) {
      step.load(weight + i + u * kStep);
      forward_step<Small>(run, &step);
      if (mask != nullptr) step.mask(static_cast<uint32_t>(bits >> (u * kStep)));
      step.store(result + i + u * kStep);
    }
  }
  for (; i < end; i += kStep) {
    load_step(weight + i, end - i, &step);
    forward_step<Small>(run, &step);
    if (mask != nullptr) step.mask(bits_at(mask, i, mask_bytes));
    store_step(step, end - i, result + i);
  }
}

// Returns the sum for Δ.
template <bool Small, int Lanes, class T>
FITCOMPRESS_INLINE double backward_piece(const Run& run, const uint8_t* mask, int64_t mask_bytes,
                                         bool regrow, const T* grad, const T* weight, int64_t begin,
                                         int64_t end, T* grad_weight) {
  double sum = 0.0;
  Step<Lanes> w, g, term;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = std::min(i + kFlush, end);
    Step<Lanes> sums = {};
    for (; i < stop; i += kStep) {
      load_step(weight + i, stop - i, &w);
      load_step(grad + i, stop - i, &g);
      backward_step<Small>(run, w, &g, &term);
      if (mask != nullptr) {
        const uint32_t bits = bits_at(mask, i, mask_bytes);
        term.mask(bits);
        if (!regrow) g.mask(bits);
      }
      for (int v = 0; v < Step<Lanes>::kVectors; ++v) sums.part[v] += term.part[v];
      store_step(g, stop - i, grad_weight + i);
    }
    float lanes[kStep];
    sums.store(lanes);
    for (int half = kStep / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    sum += lanes[0];
  }
  return sum;
}

}  // namespace

template <class T>
void fake_quantize_prune_cpu(const QuantizePruneShape& shape, const T* weight, const float* scale,
                             const uint8_t* mask, T* result) {
  if (shape.rows * shape.cols == 0) return;
  const int64_t bytes = (shape.rows * shape.cols + 7) / 8;
  for_each_piece(shape, [&](auto lanes, int64_t, int64_t run_index, int64_t begin,
                            int64_t end) __attribute__((always_inline)) {
    constexpr int kLanes = decltype(lanes)::value;
    const Run run(shape, scale[run_index]);
    if (run.delta <= 0.0f) {  // not if it is NaN
      std::memset(static_cast<void*>(result + begin), 0, sizeof(T) * (end - begin));
    } else if (run.small) {
      forward_piece<true, kLanes>(run, mask, bytes, weight, begin, end, result);
    } else {
      forward_piece<false, kLanes>(run, mask, bytes, weight, begin, end, result);
    }
  });
}

template <class T>
void fake_quantize_prune_backward_cpu(const QuantizePruneShape& shape, const T* grad,
                                      const T* weight, const float* scale, const uint8_t* mask,
                                      T* grad_weight, float* grad_scale) {
  if (shape.rows * shape.cols == 0) {
    std::fill_n(grad_scale, shape.runs(), 0.0f);
    return;
  }
  const int64_t bytes = (shape.rows * shape.cols + 7) / 8;
  const int64_t per_run = shape.pieces_per_run();
  std::vector<double> partial(per_run > 1 ? static_cast<size_t>(shape.pieces()) : 0, 0.0);
  for_each_piece(shape, [&](auto lanes, int64_t piece, int64_t run_index, int64_t begin,
                            int64_t end) __attribute__((always_inline)) {
    if (begin >= end) return;  // a last run that is shorter
    constexpr int kLanes = decltype(lanes)::value;
    const Run run(shape, scale[run_index]);
    double sum = 0.0;
    if (run.delta <= 0.0f) {  // not if it is NaN
      std::memset(static_cast<void*>(grad_weight + begin), 0, sizeof(T) * (end - begin));
    } else if (run.small) {
      sum = backward_piece<true, kLanes>(run, mask, bytes, shape.regrow, grad, weight, begin, end,
                                         grad_weight);
    } else {
      sum = backward_piece<false, kLanes>(run, mask, bytes, shape.regrow, grad, weight, begin, end,
                                          grad_weight);
    }
    if (per_run > 1) {
      partial[static_cast<size_t>(piece)] = sum;
    } else {
      grad_scale[run_index] = static_cast<float>(sum);
    }
  });
  for (int64_t run = 0; per_run > 1 && run < shape.runs(); ++run) {
    double sum = 0.0;
    for (int64_t piece = run * per_run; piece < (run + 1) * per_run; ++piece) {
      sum += partial[static_cast<size_t>(piece)];
    }
    grad_scale[run] = static_cast<float>(sum);
  }
}

#define INSTANTIATE(T)                                                                             \
  template void fake_quantize_prune_cpu<T>(const QuantizePruneShape&, const T*, const float*,      \
                                           const uint8_t*, T*);                                    \
  template void fake_quantize_prune_backward_cpu<T>(const QuantizePruneShape&, const T*, const T*, \
                                                    const float*, const uint8_t*, T*, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
