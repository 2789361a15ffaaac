// Distortion table on CUDA, in the steps of the CPU (distortion_table.cpp).
//
// The device reads the layer (device_passes.h): inspection, thresholds, and a pass for each group
// of grids, whose slots come back to the host, where the cells are evaluated as on the CPU. No sort
// and no copy of the layer; the number of passes does not depend on that of the sparsities, and on
// that of the grids only where their cells do not fit into kBudget.
#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

#include "distortion/cells.h"
#include "distortion/device_passes.h"
#include "distortion/distortion_table.h"
#include "distortion/passes.h"
#include "distortion/workspace.h"

namespace fitcompress {
namespace {

constexpr int64_t kBudget = 8 << 20;  // bytes of the slots on the host
constexpr double kRounding = 1e-6;    // more than a float32 x may be off, relative to the largest

// What is wrong with the first bad value, fetched from the device; empty if there is none.
template <class T>
std::string describe(const DeviceLayer<T>& layer, const DeviceInspection& found,
                     const DeviceQueue& queue) {
  const auto first = std::min({found.bad_weight, found.bad_given, found.bad_fisher});
  if (first == DeviceInspection::kNowhere) return {};
  const auto at = static_cast<int64_t>(first);
  std::ostringstream text;
  const auto say = [&](const char* what, const auto* values) {
    std::remove_const_t<std::remove_pointer_t<decltype(values)>> value;
    queue.to_host(&value, values + at, sizeof(value));
    text << what << to_float(value);
  };
  if (first == found.bad_weight) {
    say("weight must be finite, got ", layer.weight);
  } else if (first == found.bad_given) {
    say("importance must be at least 0, got ", layer.given);
  } else {
    say("fisher must be finite and at least 0, got ", layer.fisher);
  }
  text << " at row " << at / layer.cols << ", column " << at % layer.cols;
  return text.str();
}

// Memory on the device that grows where it must.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Scratch& scratch) : scratch_(scratch) {}
  void* at_least(int64_t bytes) {
    if (bytes > bytes_) memory_ = scratch_(bytes);
    bytes_ = std::max(bytes_, bytes);
    return memory_;
  }

 private:
  const Scratch& scratch_;
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// All passes that make slots.
template <class T>
class SlotPasses {
 public:
  SlotPasses(const DistortionShape& shape, const DeviceLayer<T>& layer,
             const DeviceInspection& found, const DeviceQueue& queue, ClassSums* sums)
      : shape_(shape),
        layer_(layer),
        max_weight_(found.max_weight),
        max_fisher_(layer.fisher == nullptr ? 1.0 : found.max_fisher),
        queue_(queue),
        sums_(sums),
        workspace_(kBudget),
        plan_{shape.count(), kBudget, sums->classes, &workspace_},
        memory_(*queue.scratch) {}

  void sum(const GridGroup& group, bool sum_pruned) {
    const DeviceGroup on_device{group.steps,
                                static_cast<int64_t>(group.size()),
                                static_cast<int64_t>(group.finest),
                                queue_.upload(group.factor),
                                queue_.upload(group.zone),
                                group.spacing[group.finest]};
    const double f = max_fisher_ * (group.steps ? 1.0 : double{max_weight_} * max_weight_);
    const double d = max_distance(group);
    sum_group(plan_, group, sum_pruned, sums_, [&](SlotTables* tables) {
      const DeviceSums wanted = device_sums(*tables, {f, f * d, f * d * d});
      fill_slots_on_device(layer_, on_device, wanted,
                           memory_.at_least(slot_bytes(wanted, plan_.classes)),
                           tables->slots->moment, queue_);
    });
  }

  void sum_family(size_t first, size_t end, bool sum_pruned) {
    while (first < end) {
      const GridGroup group =
          next_group(shape_, first, end, plan_.max_cells(), max_weight_, max_weight_);
      sum(group, sum_pruned);
      sum_pruned = false;
      first += group.own;
    }
  }

  // As sum_clipped on the CPU; clip: [B, U] on the device.
  void sum_clipped(const float* clip) {
    const auto bits = static_cast<size_t>(shape_.bit_grids());
    const auto units = static_cast<size_t>(shape_.units());
    for (size_t b = 0; b < bits; ++b) {
      const size_t next = std::min(b + 1, bits - 1);
      const DevicePair grids{static_cast<float>(largest_code(shape_.grids[b], 0.0f)),
                             static_cast<float>(largest_code(shape_.grids[next], 0.0f)),
                             clip + b * units, clip + next * units};
      GridGroup group;
      group.first = b;
      group.own = 1;
      group.add(1.0f, 0.0f, 1.0, grids.largest);
      const double delta = max_weight_ / double{grids.largest} * (1.0 + kRounding);
      const double all = max_fisher_ * max_weight_ * max_weight_ * (1.0 + kRounding);
      double* const to_next = sums_->to_next.data() + static_cast<int64_t>(b) * sums_->pitch;
      sum_group(plan_, group, false, sums_, [&](SlotTables* tables) {
        const DeviceSums wanted = device_sums(*tables, {max_fisher_ * delta * delta, all, all});
        fill_clipped_on_device(layer_, grids, wanted,
                               memory_.at_least(slot_bytes(wanted, plan_.classes)),
                               tables->slots->moment, queue_);
        for (int64_t chunk = 0; chunk < tables->chunks; ++chunk) {
          for (int64_t i = 0; i < tables->size(); ++i) {
            to_next[i % tables->classes] += tables->table(chunk)[i].moment[1];
          }
        }
      });
    }
    GridGroup nothing;  // one grid with the code 0 only: its errors are the weights themselves
    nothing.steps = true;
    nothing.add(INFINITY, 0.0f, 0.0, 0.0f);
    sum(nothing, true);
  }

 private:
  // Of an x and its value on the finest grid.
  double max_distance(const GridGroup& group) const {
    const double max_x = group.steps ? max_weight_ : 1.0;
    if (group.max_code[group.finest] == 0) return max_x;
    const double half =
        std::max(0.5 * group.spacing[group.finest], static_cast<double>(group.zone[group.finest]));
    return std::min(half, max_x) * (1.0 + kRounding) + kRounding * max_x;
  }

  DeviceSums device_sums(const SlotTables& tables, const std::array<double, 3>& bound) const {
    const int64_t chunk = std::max<int64_t>(1, ceil_div(plan_.count, tables.chunks));
    return {tables.first_cell, tables.last_cell, chunk,
            tables.chunks,     tables.pitch(),   {bound[0], bound[1], bound[2]}};
  }

  const DistortionShape& shape_;
  const DeviceLayer<T>& layer_;
  const float max_weight_;
  const double max_fisher_;
  const DeviceQueue& queue_;
  ClassSums* const sums_;
  Workspace workspace_;
  PassPlan plan_;
  DeviceMemory memory_;
};

// G × S tables on the host, to be copied into the results.
class HostTables {
 public:
  HostTables(const ClassSums& sums, int64_t count)
      : cells_(static_cast<size_t>(sums.grids * (sums.classes - 1))), nnz_(cells_) {
    for (auto& values : real_) values.resize(cells_);
    fill_tables(sums, count,
                {real_[0].data(), nnz_.data(), real_[1].data(), real_[2].data(), real_[3].data(),
                 real_[4].data(), nullptr, nullptr, nullptr, nullptr, nullptr});
  }
  void copy(const DistortionTable& to, const DeviceQueue& queue) const {
    double* const results[] = {to.distortion, to.entropy_bits, to.grid_length, to.prune_length,
                               to.norm};
    const auto bytes = static_cast<int64_t>(cells_ * sizeof(double));
    for (size_t r = 0; r < 5; ++r) queue.to_device(results[r], real_[r].data(), bytes);
    queue.to_device(to.nnz, nnz_.data(), bytes);
  }

 private:
  size_t cells_;
  std::vector<double> real_[5];
  std::vector<int64_t> nnz_;
};

// Writes the thresholds to the results, and where the kernels look them up to the layer.
template <class T>
void set_thresholds(const DistortionShape& shape, const DistortionTable& table,
                    const DeviceQueue& queue, DeviceLayer<T>* layer) {
  std::vector<uint32_t> keys(shape.dropped.size(), 0);
  std::vector<int64_t> positions(shape.dropped.size(), 0);
  if (shape.count() > 0) {
    const auto thresholds = find_thresholds_on_device(*layer, shape.dropped, queue);
    for (size_t s = 0; s < thresholds.size(); ++s) {
      keys[s] = thresholds[s].key;
      positions[s] = thresholds[s].position;
    }
  }
  const auto levels = static_cast<int64_t>(keys.size());
  // A key is the bit pattern of the threshold.
  queue.to_device(table.threshold, keys.data(), levels * static_cast<int64_t>(sizeof(float)));
  queue.to_device(table.position, positions.data(), levels * static_cast<int64_t>(sizeof(int64_t)));
  layer->levels = levels;
  layer->key = queue.upload(keys);
  layer->position = table.position;
}

// Returns whether any clip may differ from 1.
template <class T>
bool set_clips(const DistortionShape& shape, const DeviceLayer<T>& layer, float* clip,
               const DeviceQueue& queue) {
  const int64_t bits = shape.bit_grids();
  const int64_t units = shape.units();
  for (int64_t b = 0; b < bits; ++b) {
    if (layer.count() == 0) {
      const std::vector<float> first(static_cast<size_t>(units), shape.clips[0]);
      queue.to_device(clip + b * units, first.data(), units * static_cast<int64_t>(sizeof(float)));
    } else {
      const double largest = largest_code(shape.grids[static_cast<size_t>(b)], 0.0f);
      choose_clips_on_device(layer, static_cast<float>(largest), shape.clips, clip + b * units,
                             queue);
    }
  }
  return bits > 0 && (shape.clips.size() > 1 || shape.clips[0] != 1.0f);
}

}  // namespace

template <class T>
std::string distortion_table_cuda(const DistortionShape& shape, const T* weight,
                                  const float* fisher, const float* importance,
                                  const DistortionTable& table, int device, void* stream,
                                  const Scratch& scratch) {
  const DeviceScope scope(device);
  const DeviceQueue queue{stream, &scratch};
  const int64_t count = shape.count();
  const int64_t width = shape.group == 0 ? std::max<int64_t>(1, shape.cols) : shape.group;
  DeviceLayer<T> layer{shape.rows, shape.cols,  std::max<int64_t>(0, width),
                       weight,     fisher,      importance,
                       INFINITY,   table.range, 0,
                       nullptr,    nullptr};
  DeviceInspection found{};
  if (count > 0) {
    found = inspect_on_device(layer, queue);
    const std::string problem = describe(layer, found, queue);
    if (!problem.empty()) return problem;
  } else {
    const std::vector<float> zeros(static_cast<size_t>(shape.units()), 0.0f);
    queue.to_device(table.range, zeros.data(), static_cast<int64_t>(zeros.size() * sizeof(float)));
  }
  for (const Grid& grid : shape.grids) {
    if (largest_code(grid, found.max_weight) > kLargestCode) {
      return step_too_small(grid, found.max_weight);
    }
  }
  if (fisher != nullptr && std::isfinite(shape.smoothing)) {
    const double mean = found.sum_fisher / static_cast<double>(std::max<int64_t>(count, 1));
    layer.offset = static_cast<float>(shape.smoothing * mean);
    if (importance == nullptr) {
      const std::string problem =
          importance_too_large(found.max_weight, found.max_fisher, layer.offset);
      if (!problem.empty()) return problem;
    }
  }
  queue.to_device(table.offset, &layer.offset, sizeof(float));
  set_thresholds(shape, table, queue, &layer);
  const bool clipped = set_clips(shape, layer, table.clip, queue);

  ClassSums sums(static_cast<int64_t>(shape.grids.size()), layer.levels + 1);
  if (count > 0 && layer.levels > 0) {
    SlotPasses<T> passes(shape, layer, found, queue, &sums);
    const auto bits = static_cast<size_t>(shape.bit_grids());
    if (clipped) {
      passes.sum_clipped(table.clip);
    } else {
      passes.sum_family(0, bits, true);
    }
    passes.sum_family(bits, shape.grids.size(), bits == 0);
  }
  HostTables(sums, count).copy(table, queue);
  return {};
}

#define FITCOMPRESS_TABLE(T)                                                                      \
  template std::string distortion_table_cuda<T>(const DistortionShape&, const T*, const float*,   \
                                                const float*, const DistortionTable&, int, void*, \
                                                const Scratch&);
FITCOMPRESS_TABLE(float)
FITCOMPRESS_TABLE(BFloat16)
FITCOMPRESS_TABLE(Float16)

}  // namespace fitcompress
