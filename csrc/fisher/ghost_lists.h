// Which places of both tensors a block of positions is made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "fisher/ghost_places.h"
#include "fisher/ghost_plan.h"

namespace fitcompress {

// Positions [begin, end), and the numbers of the first and the last of them.
struct GhostBlock {
  int64_t begin, end;
  int64_t first, last;
};

inline GhostBlock ghost_block(const GhostPlan& plan, int64_t index) {
  const int64_t begin = index * plan.block, end = std::min(begin + plan.block, plan.positions);
  return {begin, end, plan.number(begin), plan.number(end - 1)};
}

// The positions in the gradient of the output. Columns count from the first number of the block.
inline void list_outputs(const WeightGradShape& shape, const GhostPlan& plan,
                         const GhostBlock& block, Places* places) {
  const auto& stride = shape.grad_strides;
  places->clear();
  for (int64_t p = block.begin, length; p < block.end; p += length) {
    const int64_t w = p % plan.places[2], h = p / plan.places[2] % plan.places[1];
    const int64_t d = p / plan.places[2] / plan.places[1] % plan.places[0];
    const int64_t n = p / plan.image_positions;
    length = std::min(plan.places[2] - w, block.end - p);
    places->add(n * stride[0] + d * stride[2] + h * stride[3] + w * stride[4],
                plan.number(p) - block.first, length);
  }
}

// The places of the input that some position reads, as far as those of the block reach.
inline void list_inputs(const WeightGradShape& shape, const GhostPlan& plan, const GhostPart& part,
                        const GhostBlock& block, Places* places) {
  const auto& step = shape.input_strides;
  const auto& stride = shape.stride;
  const auto& needed = part.needed;
  const int64_t end = block.last + plan.halo + 1, width = plan.grid[2];
  places->clear();
  for (int64_t u = block.first, length; u < end; u += length) {
    const int64_t begin = u % width, line = u / width, h = line % plan.grid[1];
    const int64_t d = line / plan.grid[1] % plan.grid[0], n = u / plan.image;
    length = std::min(width - begin, end - u);
    if (!needed[0][static_cast<size_t>(d)] || !needed[1][static_cast<size_t>(h)]) continue;
    const int64_t at =
        part.origin + n * step[0] + d * stride[0] * step[2] + h * stride[1] * step[3];
    for (int64_t w = begin, run; w < begin + length; w += run) {
      run = 1;
      if (!needed[2][static_cast<size_t>(w)]) continue;
      while (w + run < begin + length && needed[2][static_cast<size_t>(w + run)]) ++run;
      places->add(at + w * stride[2] * step[4], u + w - begin - block.first, run);
    }
  }
}

// Leaves out the places where all features are zero.
FITCOMPRESS_INLINE void drop_zeros(const float* data, int64_t features, int64_t feature_stride,
                                   const Places& from, uint32_t* __restrict bits, Places* to) {
  typedef uint32_t Bits __attribute__((may_alias));
  constexpr uint32_t kMagnitude = 0x7fffffffu;
  constexpr int64_t kSome = 16;
  const auto* const all = reinterpret_cast<const Bits*>(data);
  std::memset(bits, 0, static_cast<size_t>(from.count) * sizeof(uint32_t));
  const auto zeros = [&]() __attribute__((always_inline)) {
    bool any = false;
    for (int64_t p = 0; p < from.count; ++p) any |= (bits[p] & kMagnitude) == 0;
    return any;
  };

  // Rows of places, one feature after the other: where places are adjacent, or to find out where
  // it is worth going on.
  int64_t begin = 0;
  const int64_t rows = feature_stride == 1 ? 0 : from.step == 1 ? features : kSome;
  while (begin < std::min(rows, features) && zeros()) {
    const int64_t end = std::min(begin + kSome, features);
    for (; begin < end; ++begin) {
      for (int64_t r = 0; r < from.runs; ++r) {
        const PlaceRun& run = from.run(r);
        const Bits* const at = all + begin * feature_stride + run.at;
        uint32_t* __restrict const sum = bits + run.first;
        if (from.step == 1) {
          for (int64_t i = 0; i < run.length; ++i) sum[i] |= at[i];
        } else {
          for (int64_t i = 0; i < run.length; ++i) sum[i] |= at[i * from.step];
        }
      }
    }
  }
  // One place after the other.
  to->clear();
  for (int64_t p = 0; p < from.count; ++p) {
    const Bits* const at = all + from.offsets()[p];
    for (int64_t f = begin; f < features && (bits[p] & kMagnitude) == 0; f += kSome) {
      const int64_t end = std::min(f + kSome, features);
      uint32_t any = 0;
      if (feature_stride == 1) {
        for (int64_t i = f; i < end; ++i) any |= at[i];
      } else {
        for (int64_t i = f; i < end; ++i) any |= at[i * feature_stride];
      }
      bits[p] |= any;
    }
    if ((bits[p] & kMagnitude) != 0) to->add(from.offsets()[p], from.columns()[p], 1);
  }
}

}  // namespace fitcompress
