// How square_accumulate_cpu cuts its work: from shapes only, so that results do not depend on the
// number of threads.
//
// What lies side by side in a vector is what leaves the fewest lanes empty:
//
//   channels   16 channels; kernel offsets are further vectors, read from the same packed input
//   unfolded   16 of the inputs (c, k) as they follow each other: stems, small groups
//   groups     16 groups with few channels and outputs each: depthwise
//
// In each case moment is an array [sets, rows, lanes, inner]:
//
//              sets      rows       lanes       inner
//   channels   groups    outputs    channels    kernel offsets
//   unfolded   groups    outputs    inputs      1
//   groups     1         1          groups      outputs · inputs
//
// A task owns a block of rows and lanes of one set, for one chunk of samples. It goes over the
// positions of a sample in segments, boxes of places small enough to be packed into the cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <utility>

#include "common/vector.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

enum class Side { kChannels, kUnfolded, kGroups };

// Consecutive images, and a box of places in each.
struct Segment {
  int64_t image, images;
  std::array<int64_t, 3> first, size;

  int64_t places() const { return size[0] * size[1] * size[2]; }
  int64_t positions() const { return images * places(); }
};

struct Task {
  int64_t block, set, first_row, rows, first_lane, lanes, first_sample, samples;
};

// The same sums with strides and dilations without a common factor, which would skip places that
// nobody reads, and with dimensions merged that need not be apart.
inline WeightGradShape simplified(WeightGradShape s) {
  for (size_t i = 0; i < 3; ++i) {
    if (s.kernel[i] == 1) s.dilation[i] = 1;
    if (s.places[i] == 1) s.stride[i] = 1;
    const int64_t factor = s.kernel[i] == 1   ? s.stride[i]
                           : s.places[i] == 1 ? s.dilation[i]
                                              : std::gcd(s.stride[i], s.dilation[i]);
    s.input_strides[i + 2] *= factor;
    if (s.places[i] > 1) s.stride[i] /= factor;
    if (s.kernel[i] > 1) s.dilation[i] /= factor;
  }
  for (const size_t i : {size_t{1}, size_t{0}}) {
    if (i == 0 && s.places[1] * s.kernel[1] > 1) break;
    if (s.kernel[i] > 1 || s.kernel[2] > 1) break;
    const bool apart =
        s.places[i] > 1 && (s.input_strides[i + 2] != s.places[2] * s.input_strides[4] ||
                            s.grad_strides[i + 2] != s.places[2] * s.grad_strides[4]);
    if (apart) break;
    s.places[2] *= s.places[i];
    s.places[i] = 1;
  }
  return s;
}

struct Plan {
  // Of `width` lanes a vector and tiles of `tile_rows` rows.
  Plan(const WeightGradShape& from, int64_t width, int64_t tile_rows)
      : shape(simplified(from)), width(width) {
    choose_side(tile_rows);
    const int64_t kernel = shape.kernel_volume();
    sets = side == Side::kGroups ? 1 : shape.groups;
    rows = side == Side::kGroups ? 1 : shape.outputs;
    lanes = side == Side::kGroups     ? shape.groups
            : side == Side::kChannels ? shape.channels
                                      : shape.inputs();
    inner = side == Side::kGroups     ? shape.outputs * shape.inputs()
            : side == Side::kChannels ? kernel
                                      : 1;
    // Blocks are wider than high where packing the input once more costs little.
    const bool wide = inner > 1 && spread() == 1;
    row_block = side == Side::kGroups ? 1 : even_block(rows, wide ? kShort : 2 * kShort, tile_rows);
    const int64_t most = side == Side::kGroups ? width
                         : side == Side::kUnfolded
                             ? lanes
                             : (spread() == 1 ? kLong : kLong / 2) / kernel / width * width;
    lane_block = even_block(lanes, std::max(most, width), width);
    row_blocks = ceil_div(rows, row_block);
    lane_blocks = ceil_div(lanes, lane_block);
    blocks = sets * row_blocks * lane_blocks;
    cut_positions(tile_rows);

    // Without partial sums if there are blocks enough: they cost as much as a few positions.
    const int64_t worthwhile = shape.samples * shape.images * shape.positions() / kSplit;
    const int64_t splits = std::clamp<int64_t>(std::min(kTasks / blocks, worthwhile), 1,
                                               std::max<int64_t>(shape.samples, 1));
    chunk = std::min(kChunk, ceil_div(shape.samples, splits));
    wave = std::min(shape.samples, chunk * splits);

    panels = side == Side::kGroups ? shape.channels : ceil_div(lane_block, width);
    vectors = side == Side::kGroups ? inner : panels * inner;
    row_stride = (vectors | 1) * width;
    block_size = row_block * row_stride;
    round = segments > 1 ? 1 : std::clamp<int64_t>(kCache / (input_size + grad_size), 1, chunk);
  }

  Task task(int64_t index, int64_t wave_begin) const {
    Task t{};
    t.block = index % blocks;
    const int64_t split = index / blocks;
    t.set = t.block / (row_blocks * lane_blocks);
    t.first_row = t.block / lane_blocks % row_blocks * row_block;
    t.first_lane = t.block % lane_blocks * lane_block;
    t.rows = std::min(row_block, rows - t.first_row);
    t.lanes = std::min(lane_block, lanes - t.first_lane);
    t.first_sample = wave_begin + split * chunk;
    t.samples = std::min(chunk, std::min(shape.samples, wave_begin + wave) - t.first_sample);
    return t;
  }

  Segment segment(int64_t index) const {
    Segment s{};
    for (size_t i = 3; i-- > 0;) {
      const int64_t count = ceil_div(shape.places[i], box[i]);
      s.first[i] = index % count * box[i];
      s.size[i] = std::min(box[i], shape.places[i] - s.first[i]);
      index /= count;
    }
    s.image = index * images;
    s.images = std::min(images, shape.images - s.image);
    return s;
  }

  // Places of the input that `size` places of the output need.
  std::array<int64_t, 3> extent(const std::array<int64_t, 3>& size) const {
    std::array<int64_t, 3> all{};
    for (size_t i = 0; i < 3; ++i) {
      all[i] = (size[i] - 1) * shape.stride[i] + (shape.kernel[i] - 1) * shape.dilation[i] + 1;
    }
    return all;
  }

  static constexpr int64_t kShort = 64, kLong = 576;  // sides of a block
  static constexpr int64_t kTasks = 32;
  static constexpr int64_t kSplit = 1024;      // positions a partial sum is worth
  static constexpr int64_t kChunk = 32;        // samples whose squares are summed in float32
  static constexpr int64_t kPositions = 256;   // positions summed in registers, at most
  static constexpr int64_t kCache = 96 << 10;  // floats packed at a time, about
  static constexpr int64_t kSlack = 16;        // floats that may be read or written too many

  WeightGradShape shape;
  Side side;
  int64_t width;
  int64_t sets, rows, lanes, inner;  // of moment
  int64_t row_block, lane_block, row_blocks, lane_blocks, blocks;
  int64_t chunk;  // samples of a task
  int64_t wave;   // samples between two additions to moment
  int64_t round;  // samples packed at a time
  int64_t segments, images;
  std::array<int64_t, 3> box;
  int64_t positions;                        // of a segment, at most
  int64_t panels, panel_size;               // of the packed input
  int64_t grad_panels, grad_panel_size;     // of the packed gradient
  int64_t input_size, grad_size;            // floats of a packed segment
  int64_t stage_size;                       // floats of an image's box of input
  int64_t unfolded_stride;                  // floats of an unfolded position
  int64_t vectors, row_stride, block_size;  // of sums and totals

 private:
  // Places of the input for each of the output, about.
  int64_t spread() const { return shape.stride[0] * shape.stride[1] * shape.stride[2]; }

  static int64_t even_block(int64_t size, int64_t most, int64_t unit) {
    return round_up(ceil_div(size, ceil_div(size, most)), unit);
  }

  // By the vector operations of one position.
  void choose_side(int64_t tile_rows) {
    const WeightGradShape& s = shape;
    const int64_t kernel = s.kernel_volume();
    const int64_t tall = round_up(s.outputs, tile_rows / 2);
    const int64_t copies = s.channels * s.kernel[0] * s.kernel[1] *
                           (s.dilation[2] == 1 && s.kernel[2] <= kSlack ? 1 : s.kernel[2]);
    const int64_t channels = s.groups * tall * ceil_div(s.channels, width) * kernel;
    const int64_t unfolded = s.groups * (tall * ceil_div(s.inputs(), width) + 2 * copies);
    const int64_t groups =
        ceil_div(s.groups, width) * s.outputs * s.channels * (kernel + ceil_div(kernel, 8));
    side = Side::kChannels;
    if (unfolded < channels && s.inputs() <= 2 * kLong) side = Side::kUnfolded;
    if (groups < std::min(channels, unfolded)) side = Side::kGroups;
  }

  void cut_positions(int64_t tile_rows) {
    unfolded_stride = (ceil_div(lane_block, width) | 1) * width;
    const int64_t input_floats = side == Side::kGroups     ? shape.channels * width * spread()
                                 : side == Side::kChannels ? lane_block * spread()
                                                           : unfolded_stride;
    const int64_t grad_floats = side == Side::kGroups ? shape.outputs * width : row_block;
    const int64_t most = std::clamp<int64_t>(kCache / (input_floats + grad_floats), 64, kPositions);
    segments = 1;
    int64_t left = most;
    for (size_t i = 3; i-- > 0;) {
      const int64_t cuts = ceil_div(shape.places[i], std::min(shape.places[i], left));
      box[i] = ceil_div(shape.places[i], cuts);
      segments *= ceil_div(shape.places[i], box[i]);
      left = cuts > 1 ? 1 : left / box[i];
    }
    images = segments > 1 ? 1 : std::clamp<int64_t>(left, 1, shape.images);
    segments *= ceil_div(shape.images, images);
    positions = images * box[0] * box[1] * box[2];

    const auto all = extent(box);
    const int64_t volume = all[0] * all[1] * all[2];
    stage_size = side == Side::kUnfolded ? shape.channels * volume * images + kSlack : 0;
    // One more row each: panels begin in different cache sets.
    panel_size = (images * volume + 1) * width;
    grad_panel_size = (positions + 1) * (side == Side::kGroups ? width : tile_rows);
    grad_panels = side == Side::kGroups ? shape.outputs : ceil_div(row_block, tile_rows);
    input_size = side == Side::kUnfolded ? positions * unfolded_stride + kSlack
                 : side == Side::kGroups ? shape.channels * panel_size
                                         : ceil_div(lane_block, width) * panel_size;
    grad_size = round_up(grad_panels * grad_panel_size, kSlack);
  }
};

}  // namespace fitcompress
