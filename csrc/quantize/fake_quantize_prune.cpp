// ŵ = mask · Δ · clip(round(w / Δ), −q, q) and its gradient on the CPU.
//
// A task is one piece of a row, at most kQuantizePiece elements with one Δ. Forward reads w and one
// bit an element and writes ŵ; backward reads w and the gradient and writes one tensor, in the same
// pass as the sum for Δ. Bound: memory, so a small multiple of a memcpy of the same bytes.
#include "quantize/fake_quantize_prune.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"

namespace fitcompress {
namespace {

constexpr int64_t kBlock = 512;  // elements whose mask is expanded at a time; a multiple of 8
constexpr int kSums = 16;        // fixed partial sums inside a block: vectors without reordering

// The eight bytes 0 or 1 of each byte of a mask.
constexpr std::array<std::array<uint8_t, 8>, 256> make_expansion() {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (size_t byte = 0; byte < 256; ++byte) {
    for (size_t bit = 0; bit < 8; ++bit) table[byte][bit] = (byte >> bit) & 1;
  }
  return table;
}
constexpr std::array<std::array<uint8_t, 8>, 256> kExpansion = make_expansion();

// Expands the bits [begin, begin + count) into bytes; returns where the first one lies.
FITCOMPRESS_INLINE const uint8_t* expand(const uint8_t* mask, int64_t begin, int64_t count,
                                         uint8_t* bytes) {
  const int64_t first = begin / 8;
  const int64_t last = (begin + count + 7) / 8;
  for (int64_t i = first; i < last; ++i) {
    std::memcpy(bytes + 8 * (i - first), kExpansion[mask[i]].data(), 8);
  }
  return bytes + begin % 8;
}

FITCOMPRESS_INLINE float clip(float code, float max_code) {
  code = code < -max_code ? -max_code : code;
  return code > max_code ? max_code : code;
}

// Calls body(piece, row, begin, end) for every piece of every row, in parallel.
template <class Body>
void for_each_piece(const QuantizePruneShape& shape, Body body) {
  const int64_t per_row = pieces_per_row(shape.cols);
  const int64_t grain = std::max<int64_t>(1, 2 * kQuantizePiece / std::max<int64_t>(shape.cols, 1));
  parallel_for(shape.rows * per_row, grain, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t row = piece / per_row;
        const int64_t begin = row * shape.cols + (piece % per_row) * kQuantizePiece;
        const int64_t end = std::min(begin + kQuantizePiece, (row + 1) * shape.cols);
        body(piece, row, begin, end);
      }
    });
  });
}

// 0 unless keep is 1, as an operation on bits: any instruction set has it for vectors.
FITCOMPRESS_INLINE float kept(float value, uint8_t keep) {
  return float_of_bits(bits_of_float(value) & (0u - keep));
}

template <class T>
FITCOMPRESS_INLINE void widen(const T* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
}

template <class T>
FITCOMPRESS_INLINE void narrow(const float* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t j = 0; j < count; ++j) from_float(from[j], &to[j]);
}

// Forward of up to kBlock elements.
FITCOMPRESS_INLINE void quantize_block(const float* __restrict w, const uint8_t* __restrict keep,
                                       int64_t count, float step, float max_code,
                                       float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = kept(step * clip(round_even(w[j] / step), max_code), keep[j]);
  }
}

// Backward of up to kBlock elements: the gradient of w, and what each element adds to that of Δ.
FITCOMPRESS_INLINE void backward_block(const float* __restrict g, const float* __restrict w,
                                       const uint8_t* __restrict keep, int64_t count, float step,
                                       float max_code, float* __restrict out,
                                       float* __restrict term) {
  for (int64_t j = 0; j < count; ++j) {
    const float x = w[j] / step;
    const float code = round_even(x);
    const float clipped = clip(code, max_code);
    const float gradient = kept(g[j], keep[j]);
    const bool inside = clipped == code;
    term[j] = gradient * (inside ? code - x : clipped);
    out[j] = inside ? gradient : 0.0f;
  }
}

}  // namespace

template <class T>
void fake_quantize_prune_cpu(QuantizePruneShape shape, const T* weight, const float* scale,
                             const uint8_t* mask, T* result) {
  const float max_code = shape.max_code;
  for_each_piece(
      shape, [=](int64_t, int64_t row, int64_t begin, int64_t end) __attribute__((always_inline)) {
        const float step = scale[row];
        if (!(step > 0.0f)) {
          std::memset(static_cast<void*>(result + begin), 0, sizeof(T) * (end - begin));
          return;
        }
        uint8_t bytes[kBlock + 16];
        if (mask == nullptr) std::memset(bytes, 1, kBlock);
        float w[kBlock], out[kBlock];
        for (int64_t i = begin; i < end; i += kBlock) {
          const int64_t count = std::min(kBlock, end - i);
          const uint8_t* keep = mask == nullptr ? bytes : expand(mask, i, count, bytes);
          if constexpr (std::is_same_v<T, float>) {
            quantize_block(weight + i, keep, count, step, max_code, result + i);
          } else {
            widen(weight + i, count, w);
            quantize_block(w, keep, count, step, max_code, out);
            narrow(out, count, result + i);
          }
        }
      });
}

template <class T>
void fake_quantize_prune_backward_cpu(QuantizePruneShape shape, const T* grad, const T* weight,
                                      const float* scale, const uint8_t* mask, T* grad_weight,
                                      float* grad_scale) {
  const float max_code = shape.max_code;
  const int64_t per_row = pieces_per_row(shape.cols);
  std::vector<double> partial(static_cast<size_t>(shape.rows * per_row), 0.0);
  double* const partials = partial.data();

  for_each_piece(shape, [=](int64_t piece, int64_t row, int64_t begin,
                            int64_t end) __attribute__((always_inline)) {
    const float step = scale[row];
    if (!(step > 0.0f)) {
      std::memset(static_cast<void*>(grad_weight + begin), 0, sizeof(T) * (end - begin));
      return;
    }
    double sums[kSums] = {};
    uint8_t bytes[kBlock + 16];
    if (mask == nullptr) std::memset(bytes, 1, kBlock);
    float g[kBlock], w[kBlock], out[kBlock], term[kBlock + kSums];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t count = std::min(kBlock, end - i);
      const uint8_t* keep = mask == nullptr ? bytes : expand(mask, i, count, bytes);
      if constexpr (std::is_same_v<T, float>) {
        backward_block(grad + i, weight + i, keep, count, step, max_code, grad_weight + i, term);
      } else {
        widen(grad + i, count, g);
        widen(weight + i, count, w);
        backward_block(g, w, keep, count, step, max_code, out, term);
        narrow(out, count, grad_weight + i);
      }
      for (int lane = 0; lane < kSums; ++lane) term[count + lane] = 0.0f;
      for (int64_t j = 0; j < count; j += kSums) {
        for (int lane = 0; lane < kSums; ++lane) sums[lane] += term[j + lane];
      }
    }
    double sum = 0.0;
    for (const double part : sums) sum += part;
    partials[piece] = sum;
  });

  for (int64_t row = 0; row < shape.rows; ++row) {
    double sum = 0.0;
    for (int64_t piece = row * per_row; piece < (row + 1) * per_row; ++piece) {
      sum += partials[piece];
    }
    grad_scale[row] = static_cast<float>(sum);
  }
}

#define INSTANTIATE(T)                                                                      \
  template void fake_quantize_prune_cpu<T>(QuantizePruneShape, const T*, const float*,      \
                                           const uint8_t*, T*);                             \
  template void fake_quantize_prune_backward_cpu<T>(QuantizePruneShape, const T*, const T*, \
                                                    const float*, const uint8_t*, T*, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
