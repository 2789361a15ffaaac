// The passes over a layer on a device, as plain functions: device_table.cpp makes the tables of
// their results. All of them wait for what they return on the host.
//
// Nothing here depends on the order in which blocks run: sums of floats are either made in a fixed
// order or of integers (fixed point), so results are the same from run to run.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/scratch.h"

namespace fitcompress {

// Where the passes run and get their memory.
struct DeviceQueue {
  void* stream;
  const Scratch* scratch;

  void to_device(void* to, const void* from, int64_t bytes) const;
  void to_host(void* to, const void* from, int64_t bytes) const;
  template <class T>
  T* upload(const std::vector<T>& values) const {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    auto* const copy = static_cast<T*>((*scratch)(bytes));
    to_device(copy, values.data(), bytes);
    return copy;
  }
};

// Makes a device current as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

// A layer and its classes (thresholds.h); pointers point to the device. Kernels get it by value.
template <class T>
struct DeviceLayer {
  int64_t rows, cols;
  int64_t width;  // columns that share a scale, at least 1; 0: all weights share one
  const T* weight;
  const float* fisher;      // null: 1 everywhere
  const float* given;       // importance; null: (F + offset)·w², or |w| if offset is infinite
  float offset;             // κ · mean F
  float* range;             // [U]: max |w| of every scale unit
  int64_t levels;           // S
  const uint32_t* key;      // [S]: key of the first weight that stays
  const int64_t* position;  // [S]: its index

  FITCOMPRESS_HOST_DEVICE int64_t count() const { return rows * cols; }
  FITCOMPRESS_HOST_DEVICE int64_t units_a_row() const { return (cols + width - 1) / width; }
  FITCOMPRESS_HOST_DEVICE int64_t units() const { return width == 0 ? 1 : rows * units_a_row(); }
};

struct DeviceInspection {
  // Index of the first value of each kind that is not allowed, or kNowhere.
  static constexpr unsigned long long kNowhere = ~0ull;
  unsigned long long bad_weight, bad_given, bad_fisher;
  float max_weight, max_fisher;  // largest |w| and F
  double sum_fisher;
};

// Also writes layer.range.
template <class T>
DeviceInspection inspect_on_device(const DeviceLayer<T>& layer, const DeviceQueue& queue);

// The first weight, in order of (importance, flat index), that stays at a sparsity.
struct DeviceThreshold {
  uint32_t key;
  int64_t position;
};

// dropped: how many weights leave at each sparsity, ascending, fewer than the layer has.
template <class T>
std::vector<DeviceThreshold> find_thresholds_on_device(const DeviceLayer<T>& layer,
                                                       const std::vector<int64_t>& dropped,
                                                       const DeviceQueue& queue);

// Which sums (slots.h) to make: those of the cells [first_cell, last_cell) of a group of grids and
// all classes, separately for every `chunk` weights.
struct DeviceSums {
  int64_t first_cell, last_cell;
  int64_t chunk, chunks;
  int64_t pitch;    // slots from one chunk's to the next one's
  double bound[3];  // no term of a moment is larger in magnitude
};

// Grids whose codes are functions of one number (grid_group.h); arrays are on the device.
struct DeviceGroup {
  bool steps;
  int64_t grids, finest;
  const float *factor, *zone;
  double spacing;  // of the finest grid
};

// One grid with a clip for every unit, and the next one; arrays are on the device, [U].
struct DevicePair {
  float largest, next_largest;
  const float *clip, *next_clip;
};

// Writes the slots, [chunks, pitch] of four float64 numbers, to the host. `memory` is on the device
// and has room for slot_bytes(sums, classes).
int64_t slot_bytes(const DeviceSums& sums, int64_t classes);
template <class T>
void fill_slots_on_device(const DeviceLayer<T>& layer, const DeviceGroup& group,
                          const DeviceSums& sums, void* memory, double* slots,
                          const DeviceQueue& queue);
template <class T>
void fill_clipped_on_device(const DeviceLayer<T>& layer, const DevicePair& grids,
                            const DeviceSums& sums, void* memory, double* slots,
                            const DeviceQueue& queue);

// Writes to clip, [U] on the device, the first candidate with the least Σ F (θ − θ̂)² in each unit,
// for the grid whose largest code is given.
template <class T>
void choose_clips_on_device(const DeviceLayer<T>& layer, float largest,
                            const std::vector<float>& candidates, float* clip,
                            const DeviceQueue& queue);

}  // namespace fitcompress
