// Sums per (cell, class) on CUDA, as slots.h has them.
//
// A thread owns one weight at a time: codes on all grids of the group, which give the cell, a
// binary search for the class, and seven integer atomics. Sums are fixed-point numbers of two
// 64-bit limbs: a term, scaled by a power of two so that a chunk's terms cannot overflow the upper
// limb, leaves its whole part there and its fraction in the lower one. The resolution is 2^-72 of
// the largest possible term or finer, and integers add up to the same in any order. Bound: the
// atomics, which go to the second-level cache, and one division a weight (steps: a grid).
#include <algorithm>
#include <cmath>

#include "distortion/device_layer.cuh"

namespace fitcompress {
namespace {

using Limb = unsigned long long;  // two's complement

struct FixedSlot {
  Limb upper[3], lower[3];
  Limb numbers;  // positive weights plus 2^26 times negative ones, as in slots.h
};
constexpr Limb kNegative = 1ull << 26;

// Terms are multiplied by `scale`, a power of two, and fractions of that by `lower`.
struct FixedPoint {
  double scale[3], lower;

  explicit FixedPoint(const DeviceSums& sums) {
    int log_chunk = 0;
    while ((int64_t{1} << log_chunk) < sums.chunk) ++log_chunk;
    const int bits = 62 - log_chunk;
    lower = std::ldexp(1.0, bits);
    for (int m = 0; m < 3; ++m) {
      int exponent = 0;
      std::frexp(sums.bound[m], &exponent);  // bound < 2^exponent
      scale[m] = sums.bound[m] > 0.0 ? std::ldexp(1.0, std::min(bits - exponent, 1000)) : 0.0;
    }
  }
  __device__ void add(const double* terms, bool negative, FixedSlot* slot) const {
    for (int m = 0; m < 3; ++m) {
      const double scaled = terms[m] * scale[m];
      const auto whole = static_cast<long long>(scaled);
      const auto rest = static_cast<long long>((scaled - static_cast<double>(whole)) * lower);
      if (whole != 0) atomicAdd(&slot->upper[m], static_cast<Limb>(whole));
      if (rest != 0) atomicAdd(&slot->lower[m], static_cast<Limb>(rest));
    }
    atomicAdd(&slot->numbers, negative ? kNegative : Limb{1});
  }
  __device__ double value(const FixedSlot& slot, int m) const {
    const auto whole = static_cast<double>(static_cast<long long>(slot.upper[m]));
    const auto rest = static_cast<double>(static_cast<long long>(slot.lower[m]));
    return scale[m] > 0.0 ? (whole + rest / lower) / scale[m] : 0.0;
  }
};

// The slot of weight i. Tables of chunks follow each other.
__device__ FixedSlot* slot_at(const DeviceSums& sums, FixedSlot* slots, int64_t classes, int64_t i,
                              int64_t cell, int64_t of_class) {
  const int64_t size = (sums.last_cell - sums.first_cell) * classes;
  return slots + i / sums.chunk * size + (cell - sums.first_cell) * classes + of_class;
}

__device__ bool wanted(const DeviceSums& sums, int64_t cell) {
  return cell >= sums.first_cell && cell < sums.last_cell;
}

template <class T>
__global__ void slots_kernel(DeviceLayer<T> layer, DeviceGroup group, DeviceSums sums,
                             FixedPoint fixed, FixedSlot* slots) {
  const int64_t begin = blockIdx.x * kLayerPiece;
  const int64_t end = min(begin + kLayerPiece, layer.count());
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const float w = to_float(layer.weight[i]);
    const float magnitude = fabsf(w);
    const float range = group.steps ? 1.0f : layer.range[unit_of(layer, i)];
    const float x = range > 0.0f ? magnitude / range : 0.0f;  // a unit of zeros has codes 0
    int64_t cell = 0;
    float finest = 0.0f;
    for (int64_t g = 0; g < group.grids; ++g) {
      const float factor = group.factor[g];
      float code;
      if (group.steps) {
        code = x < group.zone[g] ? 0.0f : rintf(x / factor);
      } else {
        code = rintf(x * factor);
      }
      cell += static_cast<int64_t>(code);
      if (g == group.finest) finest = code;
    }
    if (!wanted(sums, cell)) continue;
    const double inverse = range > 0.0f ? 1.0 / double{range} : 0.0;
    const double d = double{magnitude} * inverse - double{finest} * group.spacing;
    const double f =
        (layer.fisher == nullptr ? 1.0 : double{layer.fisher[i]}) * (double{range} * double{range});
    const double terms[3] = {f, f * d, f * d * d};
    fixed.add(terms, w < 0.0f, slot_at(sums, slots, layer.levels + 1, i, cell, class_of(layer, i)));
  }
}

// A grid whose scale has a clip of its own in every unit, with the code as the cell and the terms
// F Δ², F (θ̂ − θ̂ of the next grid)², F (θ − θ̂)².
template <class T>
__global__ void clipped_kernel(DeviceLayer<T> layer, DevicePair grids, DeviceSums sums,
                               FixedPoint fixed, FixedSlot* slots) {
  const int64_t begin = blockIdx.x * kLayerPiece;
  const int64_t end = min(begin + kLayerPiece, layer.count());
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const int64_t unit = unit_of(layer, i);
    const float w = to_float(layer.weight[i]);
    const float magnitude = fabsf(w);
    const float range = layer.range[unit];
    const float x = range > 0.0f ? magnitude / range : 0.0f;
    const double clip = grids.clip[unit], next_clip = grids.next_clip[unit];
    const auto gain = static_cast<float>(grids.largest / clip);
    const auto next_gain = static_cast<float>(grids.next_largest / next_clip);
    const float code = fminf(rintf(x * gain), grids.largest);
    const auto cell = static_cast<int64_t>(code);
    if (!wanted(sums, cell)) continue;
    const float next_code = fminf(rintf(x * next_gain), grids.next_largest);
    const double delta = clip * range / grids.largest;
    const double value = double{code} * delta;
    const double step = value - double{next_code} * (next_clip * range / grids.next_largest);
    const double error = double{magnitude} - value;
    const double f = layer.fisher == nullptr ? 1.0 : layer.fisher[i];
    const double terms[3] = {f * (delta * delta), f * (step * step), f * (error * error)};
    fixed.add(terms, w < 0.0f, slot_at(sums, slots, layer.levels + 1, i, cell, class_of(layer, i)));
  }
}

// Fixed-point slots to float64 ones, in the layout of the host.
__global__ void convert_kernel(const FixedSlot* slots, FixedPoint fixed, int64_t size,
                               int64_t chunks, int64_t pitch, double* result) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kLayerThreads) + threadIdx.x;
  if (i >= size * chunks) return;
  double* const to = result + 4 * (i / size * pitch + i % size);
  for (int m = 0; m < 3; ++m) to[m] = fixed.value(slots[i], m);
  to[3] = static_cast<double>(slots[i].numbers);
}

// Calls launch(fixed, slots) between setting the slots to 0 and converting them.
template <class Launch>
void fill(int64_t classes, const DeviceSums& sums, void* memory, double* result,
          const DeviceQueue& queue, const Launch& launch) {
  const int64_t size = (sums.last_cell - sums.first_cell) * classes;
  const auto bytes = static_cast<size_t>(slot_bytes(sums, classes));
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream_of(queue)), "distortion_table");
  auto* const slots = static_cast<FixedSlot*>(memory);
  auto* const converted = reinterpret_cast<double*>(slots + size * sums.chunks);
  const FixedPoint fixed(sums);
  launch(fixed, slots);
  check_cuda(cudaGetLastError(), "distortion_table");
  convert_kernel<<<grid_size(divide_up(size * sums.chunks, kLayerThreads)), kLayerThreads, 0,
                   stream_of(queue)>>>(slots, fixed, size, sums.chunks, sums.pitch, converted);
  check_cuda(cudaGetLastError(), "distortion_table");
  queue.to_host(result, converted,
                sums.chunks * sums.pitch * 4 * static_cast<int64_t>(sizeof(double)));
}

}  // namespace

int64_t slot_bytes(const DeviceSums& sums, int64_t classes) {
  const int64_t slots = (sums.last_cell - sums.first_cell) * classes * sums.chunks;
  return slots * static_cast<int64_t>(sizeof(FixedSlot)) +
         sums.pitch * sums.chunks * 4 * static_cast<int64_t>(sizeof(double));
}

template <class T>
void fill_slots_on_device(const DeviceLayer<T>& layer, const DeviceGroup& group,
                          const DeviceSums& sums, void* memory, double* slots,
                          const DeviceQueue& queue) {
  fill(layer.levels + 1, sums, memory, slots, queue,
       [&](const FixedPoint& fixed, FixedSlot* fixed_slots) {
         slots_kernel<<<layer_blocks(layer.count()), kLayerThreads, 0, stream_of(queue)>>>(
             layer, group, sums, fixed, fixed_slots);
       });
}

template <class T>
void fill_clipped_on_device(const DeviceLayer<T>& layer, const DevicePair& grids,
                            const DeviceSums& sums, void* memory, double* slots,
                            const DeviceQueue& queue) {
  fill(layer.levels + 1, sums, memory, slots, queue,
       [&](const FixedPoint& fixed, FixedSlot* fixed_slots) {
         clipped_kernel<<<layer_blocks(layer.count()), kLayerThreads, 0, stream_of(queue)>>>(
             layer, grids, sums, fixed, fixed_slots);
       });
}

#define FITCOMPRESS_SLOTS(T)                                                                    \
  template void fill_slots_on_device<T>(const DeviceLayer<T>&, const DeviceGroup&,              \
                                        const DeviceSums&, void*, double*, const DeviceQueue&); \
  template void fill_clipped_on_device<T>(const DeviceLayer<T>&, const DevicePair&,             \
                                          const DeviceSums&, void*, double*, const DeviceQueue&);
FITCOMPRESS_SLOTS(float)
FITCOMPRESS_SLOTS(BFloat16)
FITCOMPRESS_SLOTS(Float16)

}  // namespace fitcompress
