// What one task of square_accumulate_cpu does: packs its block of both tensors, round by round and
// segment by segment, and multiplies.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/vector.h"
#include "fisher/pack.h"
#include "fisher/square_plan.h"
#include "fisher/square_tile.h"

namespace fitcompress {

struct Operands {
  const float *grad, *input;
  const char* moment;  // only to fetch it in time; may be null
  int64_t moment_bytes;
};

// Work space of one thread.
struct Workspace {
  explicit Workspace(const Plan& plan, bool with_totals)
      : input(make_buffer<float>(plan.round * plan.input_size)),
        grad(make_buffer<float>(plan.round * plan.grad_size)),
        stage(make_buffer<float>(plan.stage_size)),
        products(make_buffer<float>(plan.segments > 1 ? plan.block_size : 0)),
        totals(make_buffer<float>(with_totals ? plan.block_size : 0)),
        norms(make_buffer<double>(plan.chunk * plan.width)),
        window(make_buffer<int64_t>(plan.positions)),
        at(make_buffer<int64_t>(plan.positions)),
        offset(make_buffer<int64_t>(plan.shape.inputs() + plan.vectors)),
        used(make_buffer<int64_t>(plan.vectors)),
        ordered(make_buffer<float>((plan.inner + 1) * plan.width)),
        sum(make_buffer<double>(plan.inner * plan.width)) {}

  Buffer<float> input, grad, stage, products, totals;
  Buffer<double> norms;
  Buffer<int64_t> window;  // [positions] where it begins in the packed or staged input
  Buffer<int64_t> at;      // [positions] where its inputs lie, unfolded
  Buffer<int64_t> offset;  // of a place in the window: of each vector, or of each row of it
  Buffer<int64_t> used;    // [vectors] lanes
  // Of a vector of lanes, in the order of moment:
  Buffer<float> ordered;
  Buffer<double> sum;
};

// Where windows and what is in them lie in the packed input.
FITCOMPRESS_INLINE void find_windows(const Plan& plan, const Segment& segment, int64_t* window) {
  const auto& s = plan.shape;
  const auto size = plan.extent(segment.size);
  const bool staged = plan.side == Side::kUnfolded;
  const int64_t unit = staged ? 1 : plan.width;
  const int64_t volume = size[0] * size[1] * size[2] * (staged ? s.channels : 1);
  for (int64_t n = 0; n < segment.images; ++n)
    for (int64_t d = 0; d < segment.size[0]; ++d)
      for (int64_t h = 0; h < segment.size[1]; ++h) {
        const int64_t row = n * volume + (d * s.stride[0] * size[1] + h * s.stride[1]) * size[2];
        for (int64_t w = 0; w < segment.size[2]; ++w) {
          *window++ = (row + w * s.stride[2]) * unit;
        }
      }
}

// Offsets of the kernel in a window, of `rows` only those at its left end.
FITCOMPRESS_INLINE int64_t find_offsets(const Plan& plan, const std::array<int64_t, 3>& size,
                                        bool rows, int64_t unit, int64_t* offset) {
  const auto& s = plan.shape;
  int64_t count = 0;
  for (int64_t d = 0; d < s.kernel[0]; ++d)
    for (int64_t h = 0; h < s.kernel[1]; ++h)
      for (int64_t w = 0; w < (rows ? 1 : s.kernel[2]); ++w) {
        offset[count++] =
            ((d * s.dilation[0] * size[1] + h * s.dilation[1]) * size[2] + w * s.dilation[2]) *
            unit;
      }
  return count;
}

// Where each vector lies in the packed input, from where its position does.
FITCOMPRESS_INLINE void find_inputs(const Plan& plan, const Segment& segment,
                                    const Workspace& scratch) {
  find_windows(plan, segment, scratch.window.get());
  int64_t* const offset = scratch.offset.get();
  if (plan.side == Side::kUnfolded) {
    for (int64_t v = 0; v < plan.vectors; ++v) offset[v] = v * plan.width;
    for (int64_t p = 0; p < plan.positions; ++p) scratch.at[p] = p * plan.unfolded_stride;
    return;
  }
  const int64_t each = find_offsets(plan, plan.extent(segment.size), false, plan.width, offset);
  for (int64_t v = each; v < plan.panels * each; ++v) {
    offset[v] = offset[v - each] + plan.panel_size;
  }
}

// What is packed of a segment: all places of the input that it needs, and its own of the gradient.
struct Sources {
  Sources(const Plan& plan, const Segment& segment) {
    input.size = plan.extent(segment.size);
    grad.size = segment.size;
    for (size_t i = 0; i < 3; ++i) {
      input.stride[i] = plan.shape.input_strides[i + 2];
      grad.stride[i] = plan.shape.grad_strides[i + 2];
    }
  }

  Source input{}, grad{};
};

// Of one image, from the segment's first place on.
struct Image {
  const float *input, *grad;
};

template <int Lanes>
FITCOMPRESS_INLINE void pack_groups(const Plan& plan, const Task& task, const Image& image,
                                    Sources from, float* input, float* grad) {
  const auto& s = plan.shape;
  const int64_t input_stride = s.input_strides[1], grad_stride = s.grad_strides[1];
  from.input.lanes = from.grad.lanes = task.lanes;
  from.input.lane_stride = s.channels * input_stride;
  from.grad.lane_stride = s.outputs * grad_stride;
  for (int64_t c = 0; c < s.channels; ++c) {
    from.input.data = image.input + (task.first_lane * s.channels + c) * input_stride;
    pack<Lanes>(from.input, input + c * plan.panel_size, 0);
  }
  for (int64_t o = 0; o < s.outputs; ++o) {
    from.grad.data = image.grad + (task.first_lane * s.outputs + o) * grad_stride;
    pack<Lanes>(from.grad, grad + o * plan.grad_panel_size, 0);
  }
}

// `input`: the packed input, or the stage if that is still to be unfolded.
template <int Lanes>
FITCOMPRESS_INLINE void pack_channels(const Plan& plan, const Task& task, const Image& image,
                                      Sources from, float* input, float* grad) {
  const auto& s = plan.shape;
  from.grad.lanes = task.rows;
  from.grad.lane_stride = s.grad_strides[1];
  from.grad.data = image.grad + (task.set * s.outputs + task.first_row) * s.grad_strides[1];
  pack<kTileRows<Lanes>>(from.grad, grad, plan.grad_panel_size);
  from.input.lane_stride = s.input_strides[1];
  from.input.data = image.input + task.set * s.channels * s.input_strides[1];
  if (plan.side == Side::kUnfolded) {
    from.input.lanes = s.channels;
    copy_box(from.input, input);
  } else {
    from.input.lanes = task.lanes;
    from.input.data += task.first_lane * s.input_strides[1];
    pack<Lanes>(from.input, input, plan.panel_size);
  }
}

// One segment of samples [first, first + count), packed.
template <int Lanes>
FITCOMPRESS_INLINE void pack_samples(const Plan& plan, const Operands& data, const Task& task,
                                     const Segment& segment, int64_t first, int64_t count,
                                     const Workspace& scratch) {
  const auto& s = plan.shape;
  const auto size = plan.extent(segment.size);
  const int64_t volume = size[0] * size[1] * size[2];
  const bool by_group = plan.side == Side::kGroups, unfolded = plan.side == Side::kUnfolded;
  int64_t* const window_rows = scratch.offset.get() + plan.vectors;
  const int64_t rows = s.kernel[0] * s.kernel[1] * s.channels;
  if (unfolded) {
    const int64_t each = find_offsets(plan, size, true, 1, window_rows);
    for (int64_t r = each; r < rows; ++r) window_rows[r] = window_rows[r - each] + volume;
  }
  const Sources sources(plan, segment);
  for (int64_t b = 0; b < count; ++b) {
    float* const to = scratch.input.get() + b * plan.input_size;
    float* input = unfolded ? scratch.stage.get() : to;
    float* grad = scratch.grad.get() + b * plan.grad_size;
    for (int64_t n = 0; n < segment.images; ++n) {
      const int64_t index = (first + b) * s.images + segment.image + n;
      Image image{data.input + index * s.input_strides[0], data.grad + index * s.grad_strides[0]};
      for (size_t i = 0; i < 3; ++i) {
        image.input += segment.first[i] * s.stride[i] * s.input_strides[i + 2];
        image.grad += segment.first[i] * s.grad_strides[i + 2];
      }
      if (by_group) {
        pack_groups<Lanes>(plan, task, image, sources, input, grad);
      } else {
        pack_channels<Lanes>(plan, task, image, sources, input, grad);
      }
      input += volume * (unfolded ? s.channels : Lanes);
      grad += segment.places() * (by_group ? Lanes : kTileRows<Lanes>);
    }
    if (!unfolded) continue;
    std::memset(input, 0, Plan::kSlack * sizeof(float));
    unfold<Lanes>(scratch.stage.get(), scratch.window.get(), segment.positions(), window_rows, rows,
                  s.kernel[2], s.dilation[2], plan.unfolded_stride, to);
  }
}

template <int Lanes, int Rows>
FITCOMPRESS_INLINE void multiply_rows(const Packed& packed, const float* grad, int64_t vectors,
                                      const int64_t* offset, const int64_t* used, int64_t rows,
                                      const Sums& sums) {
  if (vectors == 3) {
    multiply_tile<Lanes, Rows, kTileVectors<Lanes>>(packed, grad, offset, used, rows, sums);
  } else if (vectors == 2) {
    multiply_tile<Lanes, Rows, 2>(packed, grad, offset, used, rows, sums);
  } else {
    multiply_tile<Lanes, Rows, 1>(packed, grad, offset, used, rows, sums);
  }
}

// Fetches as much of the rows of moment as a tile at (row, lane) covers, though not the same: all
// tiles of a block fetch all of it, while there is time.
FITCOMPRESS_INLINE void fetch(const Plan& plan, const Operands& data, const Task& task, int64_t row,
                              int64_t rows, int64_t lane, int64_t lanes) {
  for (int64_t r = row; r < std::min(row + rows, task.rows); ++r) {
    const int64_t at =
        ((task.set * plan.rows + task.first_row + r) * plan.lanes + task.first_lane) * plan.inner;
    const char* const from = data.moment + (at + lane) * data.moment_bytes;
    for (int64_t i = 0; i < lanes * data.moment_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

template <int Lanes>
FITCOMPRESS_INLINE void multiply(const Plan& plan, const Operands& data, const Task& task,
                                 const Packed& packed, const Sums& sums, const Workspace& scratch) {
  constexpr int kRows = kTileRows<Lanes>, kVectors = kTileVectors<Lanes>;
  const int64_t vectors = ceil_div(task.lanes, Lanes) * plan.inner;
  for (int64_t v = 0, now; v < vectors; v += now) {
    const int64_t left = vectors - v;
    now = std::min<int64_t>(kVectors, left == 4 ? 2 : left);
    for (int64_t r = 0; r < task.rows; r += kRows) {
      Sums at = sums;
      at.products += r * sums.stride + v * Lanes;
      if (at.totals != nullptr) at.totals += r * sums.stride + v * Lanes;
      const float* const grad = packed.grad + r / kRows * plan.grad_panel_size;
      const int64_t* const offset = scratch.offset.get() + v;
      const int64_t* const used = scratch.used.get() + v;
      const int64_t rows = task.rows - r;
      if (data.moment != nullptr) fetch(plan, data, task, r, kRows, v * Lanes, now * Lanes);
      if (rows > kRows / 2) {
        multiply_rows<Lanes, kRows>(packed, grad, now, offset, used, rows, at);
      } else {
        multiply_rows<Lanes, kRows / 2>(packed, grad, now, offset, used, rows, at);
      }
    }
  }
}

// The same with groups side by side.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_groups(const Plan& plan, Packed packed, const Sums& sums,
                                        const Workspace& scratch) {
  const int64_t kernel = plan.shape.kernel_volume(), channels = plan.shape.channels;
  const float* const input = packed.input;
  int64_t v = 0;
  for (int64_t o = 0; o < plan.shape.outputs; ++o)
    for (int64_t c = 0; c < channels; ++c) {
      packed.input = input + c * plan.panel_size;
      const float* const grad = packed.grad + o * plan.grad_panel_size;
      for (int64_t k = 0, now; k < kernel; k += now, v += now) {
        Sums at = sums;
        at.products += v * Lanes;
        if (at.totals != nullptr) at.totals += v * Lanes;
        const int64_t* const offset = scratch.offset.get() + k;
        const int64_t* const used = scratch.used.get();
        const int64_t left = kernel - k;
        if (left >= 9 && left != 25) {
          now = 9;
          multiply_strip<Lanes, 9>(packed, grad, offset, used, at);
        } else if (left >= 5) {
          now = 5;
          multiply_strip<Lanes, 5>(packed, grad, offset, used, at);
        } else if (left >= 3) {
          now = 3;
          multiply_strip<Lanes, 3>(packed, grad, offset, used, at);
        } else {
          now = 1;
          multiply_strip<Lanes, 1>(packed, grad, offset, used, at);
        }
      }
    }
}

// Squares of the samples of one task: totals[row][vector][lane], and norms[sample].
template <int Lanes>
FITCOMPRESS_INLINE void square(const Plan& plan, const Operands& data, const Task& task,
                               const Workspace& scratch, float* totals, double* norms) {
  const int64_t rows = round_up(task.rows, plan.side == Side::kGroups ? 1 : kTileRows<Lanes>);
  if (totals != nullptr) {
    std::memset(totals, 0, static_cast<size_t>(rows * plan.row_stride) * sizeof(float));
  }
  std::memset(scratch.norms.get(), 0, static_cast<size_t>(task.samples * Lanes) * sizeof(double));
  for (int64_t v = 0; v < plan.vectors; ++v) {
    const int64_t first = plan.side == Side::kGroups ? 0 : v / plan.inner * Lanes;
    scratch.used[v] = std::min<int64_t>(Lanes, task.lanes - first);
  }
  for (int64_t begin = 0; begin < task.samples; begin += plan.round) {
    const int64_t count = std::min(plan.round, task.samples - begin);
    for (int64_t i = 0; i < plan.segments; ++i) {
      const Segment segment = plan.segment(i);
      if (begin == 0 || plan.segments > 1) find_inputs(plan, segment, scratch);
      pack_samples<Lanes>(plan, data, task, segment, task.first_sample + begin, count, scratch);
      Packed packed{};
      packed.input = scratch.input.get();
      packed.grad = scratch.grad.get();
      packed.input_size = plan.input_size;
      packed.grad_size = plan.grad_size;
      packed.at = (plan.side == Side::kUnfolded ? scratch.at : scratch.window).get();
      packed.positions = segment.positions();
      packed.samples = count;
      packed.first = i == 0;
      packed.last = i + 1 == plan.segments;
      const Sums sums{scratch.products.get(), totals,
                      norms == nullptr ? nullptr : scratch.norms.get() + begin * Lanes,
                      plan.row_stride};
      if (plan.side == Side::kGroups) {
        multiply_groups<Lanes>(plan, packed, sums, scratch);
      } else {
        const bool last = packed.last && begin + count == task.samples;
        const Operands ahead{nullptr, nullptr, last ? data.moment : nullptr, data.moment_bytes};
        multiply<Lanes>(plan, ahead, task, packed, sums, scratch);
      }
    }
  }
  if (norms == nullptr) return;
  for (int64_t b = 0; b < task.samples; ++b) {
    double norm = 0.0;
    for (int l = 0; l < Lanes; ++l) norm += scratch.norms[b * Lanes + l];
    norms[b] = norm;
  }
}

}  // namespace fitcompress
