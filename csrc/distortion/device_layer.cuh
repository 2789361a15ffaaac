// What a thread needs to know of one weight: its scale unit, key and class.
#pragma once

#include "common/cuda.h"
#include "distortion/device_passes.h"

namespace fitcompress {

constexpr int kLayerThreads = 256;
constexpr int64_t kLayerPiece = 4096;  // weights of a block

inline unsigned layer_blocks(int64_t count) { return grid_size(divide_up(count, kLayerPiece)); }

inline cudaStream_t stream_of(const DeviceQueue& queue) {
  return static_cast<cudaStream_t>(queue.stream);
}

template <class T>
__device__ int64_t unit_of(const DeviceLayer<T>& layer, int64_t i) {
  if (layer.width == 0) return 0;
  if (layer.width >= layer.cols) return i / layer.cols;
  return i / layer.cols * layer.units_a_row() + i % layer.cols / layer.width;
}

// The bit pattern of the importance, a float32 number ≥ 0.
template <class T>
__device__ uint32_t key_of(const DeviceLayer<T>& layer, int64_t i) {
  float importance;
  if (layer.given != nullptr) {
    importance = layer.given[i];
  } else {
    importance = to_float(layer.weight[i]);
    if (layer.offset < INFINITY) {
      importance = (layer.fisher[i] + layer.offset) * (importance * importance);
    }
  }
  return bits_of_float(importance) & 0x7fffffffu;
}

// The number of thresholds that are not above the weight.
template <class T>
__device__ int64_t class_of(const DeviceLayer<T>& layer, int64_t i) {
  const uint32_t key = key_of(layer, i);
  int64_t low = 0, high = layer.levels;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const bool reached =
        layer.key[middle] < key || (layer.key[middle] == key && layer.position[middle] <= i);
    if (reached) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace fitcompress
