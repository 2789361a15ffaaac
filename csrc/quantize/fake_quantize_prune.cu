// ŵ = mask · Δ · clip(round(w / Δ), lo, hi) and its gradient on CUDA.
//
// A warp owns one piece, at most kWarpPiece elements with one Δ; its lanes take 16 bytes each at a
// time where rows and runs begin at multiples of them, else one element each. Forward reads w and
// one bit an element and writes ŵ; backward also reads the gradient, and leaves one float64 sum a
// piece, which a second kernel adds up for each run. The same bits as on the CPU, but for these
// sums, which there begin in float32. Bound: memory.
#include <algorithm>
#include <initializer_list>

#include "common/cuda.h"
#include "common/dtype.h"
#include "quantize/fake_quantize_prune.h"

namespace fitcompress {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int64_t kWarpPiece = 1024;

template <class T>
constexpr int kPackWidth = 16 / sizeof(T);

// `Width` neighbouring elements.
template <class T, int Width>
struct alignas(sizeof(T) * Width) Pack {
  T values[Width];
};

// Elements i … i + Width − 1, or those of them before the end.
template <class T, int Width>
__device__ Pack<T, Width> load(const T* from, int64_t i, int64_t end) {
  if (i + Width <= end) return *reinterpret_cast<const Pack<T, Width>*>(from + i);
  Pack<T, Width> pack = {};
  for (int j = 0; i + j < end; ++j) pack.values[j] = from[i + j];
  return pack;
}

template <class T, int Width>
__device__ void store(const Pack<T, Width>& pack, T* to, int64_t i, int64_t end) {
  if (i + Width <= end) {
    *reinterpret_cast<Pack<T, Width>*>(to + i) = pack;
  } else {
    for (int j = 0; i + j < end; ++j) to[i + j] = pack.values[j];
  }
}

// The elements of a warp.
struct Piece {
  int64_t index, run, begin, end;  // none if begin ≥ end

  __device__ Piece(const QuantizePruneShape& shape, int64_t per_run)
      : index(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32),
        run(index / per_run),
        begin(0),
        end(0) {
    if (run >= shape.runs()) return;
    const int64_t row = run / shape.runs_per_row();
    const int64_t first = row * shape.cols + run % shape.runs_per_row() * shape.width;
    const int64_t last = min(first + shape.width, (row + 1) * shape.cols);
    begin = first + index % per_run * kWarpPiece;
    end = min(begin + kWarpPiece, last);
  }
};

__host__ __device__ int64_t warp_pieces_per_run(const QuantizePruneShape& shape) {
  return (shape.width + kWarpPiece - 1) / kWarpPiece;
}

// The bits of the mask of elements i … i + Width − 1; i is a multiple of Width.
template <int Width>
__device__ unsigned mask_bits(const uint8_t* mask, int64_t i) {
  return mask == nullptr ? ~0u : static_cast<unsigned>(mask[i / 8]) >> (i % 8);
}

__device__ float clip(float code, float low, float high) {  // NaN stays NaN
  code = code < low ? low : code;
  return code > high ? high : code;
}

template <class T, int Width>
__global__ void forward_kernel(QuantizePruneShape shape, int64_t per_run, const T* weight,
                               const float* scale, const uint8_t* mask, T* result) {
  const Piece piece(shape, per_run);
  if (piece.begin >= piece.end) return;
  const float delta = scale[piece.run];
  const int64_t lane = threadIdx.x % 32;
  for (int64_t i = piece.begin + lane * Width; i < piece.end; i += 32 * Width) {
    auto pack = load<T, Width>(weight, i, piece.end);
    const unsigned bits = mask_bits<Width>(mask, i);
    for (int j = 0; j < Width; ++j) {
      float value = 0.0f;
      if (!(delta <= 0.0f) && ((bits >> j) & 1u) != 0) {
        const float code = rintf(to_float(pack.values[j]) / delta) + 0.0f;
        value = delta * clip(code, shape.min_code, shape.max_code);
      }
      from_float(value, &pack.values[j]);
    }
    store(pack, result, i, piece.end);
  }
}

template <class T, int Width>
__global__ void backward_kernel(QuantizePruneShape shape, int64_t per_run, const T* grad,
                                const T* weight, const float* scale, const uint8_t* mask,
                                T* grad_weight, double* partial) {
  const Piece piece(shape, per_run);
  if (piece.run >= shape.runs()) return;
  const float delta = scale[piece.run];
  const int64_t lane = threadIdx.x % 32;
  double sum = 0.0;
  for (int64_t i = piece.begin + lane * Width; i < piece.end; i += 32 * Width) {
    const auto weights = load<T, Width>(weight, i, piece.end);
    auto grads = load<T, Width>(grad, i, piece.end);
    const unsigned bits = mask_bits<Width>(mask, i);
    for (int j = 0; j < Width; ++j) {
      float gradient = 0.0f;
      if (!(delta <= 0.0f)) {
        const bool kept = ((bits >> j) & 1u) != 0;
        const float x = to_float(weights.values[j]) / delta;
        const float code = rintf(x) + 0.0f;
        const float clipped = clip(code, shape.min_code, shape.max_code);
        const float incoming = to_float(grads.values[j]);
        const bool inside = clipped == code;
        if (inside && (kept || shape.regrow)) gradient = incoming;
        if (kept) sum += incoming * (inside ? code - x : clipped);
      }
      from_float(gradient, &grads.values[j]);
    }
    store(grads, grad_weight, i, piece.end);
  }
  sum = warp_sum(sum);
  if (lane == 0) partial[piece.index] = sum;
}

// A warp adds up the pieces of a run.
__global__ void sum_pieces_kernel(int64_t runs, int64_t per_run, const double* partial,
                                  float* grad_scale) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (run >= runs) return;
  const int64_t lane = threadIdx.x % 32;
  double sum = 0.0;
  for (int64_t i = lane; i < per_run; i += 32) sum += partial[run * per_run + i];
  sum = warp_sum(sum);
  if (lane == 0) grad_scale[run] = static_cast<float>(sum);
}

// Whether all runs of these tensors begin at multiples of 16 bytes.
template <class T>
bool in_packs(const QuantizePruneShape& shape, std::initializer_list<const T*> tensors) {
  constexpr int64_t kWidth = kPackWidth<T>;
  const bool rows = shape.rows == 1 || shape.cols % kWidth == 0;
  const bool runs = shape.runs_per_row() == 1 || shape.width % kWidth == 0;
  return rows && runs && std::all_of(tensors.begin(), tensors.end(), [](const T* tensor) {
           return reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
         });
}

}  // namespace

template <class T>
void fake_quantize_prune_cuda(const QuantizePruneShape& shape, const T* weight, const float* scale,
                              const uint8_t* mask, T* result, int device, void* stream) {
  if (shape.rows * shape.cols == 0) return;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const int64_t per_run = warp_pieces_per_run(shape);
  const unsigned blocks = grid_size(divide_up(shape.runs() * per_run, kWarps));
  const auto kernel = in_packs<T>(shape, {weight, result}) ? forward_kernel<T, kPackWidth<T>>
                                                           : forward_kernel<T, 1>;
  kernel<<<blocks, kWarps * 32, 0, queue>>>(shape, per_run, weight, scale, mask, result);
  check_cuda(cudaGetLastError(), "fake_quantize_prune");
}

template <class T>
void fake_quantize_prune_backward_cuda(const QuantizePruneShape& shape, const T* grad,
                                       const T* weight, const float* scale, const uint8_t* mask,
                                       T* grad_weight, float* grad_scale, int device, void* stream,
                                       const Scratch& scratch) {
  if (shape.runs() == 0) return;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const int64_t per_run = warp_pieces_per_run(shape);
  const unsigned blocks = grid_size(divide_up(shape.runs() * per_run, kWarps));
  double* const partial = allocate<double>(scratch, shape.runs() * per_run);
  const bool packs = in_packs<T>(shape, {grad, weight, grad_weight});
  const auto kernel = packs ? backward_kernel<T, kPackWidth<T>> : backward_kernel<T, 1>;
  kernel<<<blocks, kWarps * 32, 0, queue>>>(shape, per_run, grad, weight, scale, mask, grad_weight,
                                            partial);
  const unsigned sum_blocks = grid_size(divide_up(shape.runs(), kWarps));
  sum_pieces_kernel<<<sum_blocks, kWarps * 32, 0, queue>>>(shape.runs(), per_run, partial,
                                                           grad_scale);
  check_cuda(cudaGetLastError(), "fake_quantize_prune_backward");
}

#define INSTANTIATE(T)                                                                           \
  template void fake_quantize_prune_cuda<T>(const QuantizePruneShape&, const T*, const float*,   \
                                            const uint8_t*, T*, int, void*);                     \
  template void fake_quantize_prune_backward_cuda<T>(const QuantizePruneShape&, const T*,        \
                                                     const T*, const float*, const uint8_t*, T*, \
                                                     float*, int, void*, const Scratch&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace fitcompress
