// How winograd_norms_cpu cuts its work: from shapes only, so that results do not depend on the
// number of threads.
//
// A task owns some outputs of one sample. It goes over the tiles of its images in segments, boxes
// of tiles of one image whose transforms fit into the cache, and over outputs and channels in
// blocks whose 36 matrices of products do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/vector.h"
#include "fisher/weight_grad.h"
#include "fisher/winograd_transform.h"

namespace fitcompress {

struct WinogradSegment {
  int64_t image;
  int64_t first[2], size[2];  // tiles, along height and width

  int64_t tiles() const { return size[0] * size[1]; }
};

struct WinogradPlan {
  WinogradPlan(const WeightGradShape& shape, int64_t width) : shape(shape), width(width) {
    int64_t left = kTiles;
    for (const int i : {1, 0}) {
      const int64_t all = ceil_div(shape.places[static_cast<size_t>(i) + 1], kTile);
      cuts[i] = ceil_div(all, std::min(all, left));
      box[i] = ceil_div(all, cuts[i]);
      cuts[i] = ceil_div(all, box[i]);
      left = cuts[i] > 1 ? 1 : left / box[i];
    }
    segments = shape.images * cuts[0] * cuts[1];

    const int64_t splits =
        std::min(ceil_div(shape.outputs, kFewOutputs), ceil_div(kTasks, shape.samples));
    outputs = even_block(shape.outputs, std::min(ceil_div(shape.outputs, splits), kOutputs), width);
    output_splits = ceil_div(shape.outputs, outputs);
    tasks = shape.samples * output_splits;

    rows = std::min(kRows, round_up(outputs, width));
    columns = even_block(shape.channels, kColumns, width);

    // Odd numbers of vectors: what is used together lies in different cache sets.
    panel = (box[0] * box[1] | 1) * width;
    input_stride = (columns / width | 1) * panel;
    grad_stride = (ceil_div(outputs, width) | 1) * panel;
    product_stride = (rows * columns / width | 1) * width;
    block_size = kPoints * product_stride;
    kept_blocks = segments > 1 ? ceil_div(outputs, rows) * ceil_div(shape.channels, columns) : 1;
    stage = kWindow * (box[1] * kTile + 2) * width;
  }

  WinogradSegment segment(int64_t index) const {
    WinogradSegment s{};
    for (const int i : {1, 0}) {
      s.first[i] = index % cuts[i] * box[i];
      s.size[i] =
          std::min(box[i], ceil_div(shape.places[static_cast<size_t>(i) + 1], kTile) - s.first[i]);
      index /= cuts[i];
    }
    s.image = index;
    return s;
  }

  static int64_t even_block(int64_t size, int64_t most, int64_t unit) {
    return round_up(ceil_div(size, ceil_div(size, most)), unit);
  }

  static constexpr int64_t kTiles = 72;                // of a segment, at most
  static constexpr int64_t kOutputs = 256;             // of a task, at most
  static constexpr int64_t kFewOutputs = 64;           // not worth splitting
  static constexpr int64_t kTasks = 16;                // wanted
  static constexpr int64_t kRows = 32, kColumns = 64;  // outputs and channels of a block

  const WeightGradShape& shape;
  int64_t width;  // lanes of a vector
  int64_t cuts[2], box[2], segments;
  int64_t outputs, output_splits, tasks;
  int64_t rows, columns;                     // of a block
  int64_t panel, input_stride, grad_stride;  // of the transforms [36][panels][tiles][width]
  int64_t product_stride;                    // of the products [36][rows][columns]
  int64_t block_size, kept_blocks;           // of all products
  int64_t stage;                             // floats of a packed row of tiles
};

}  // namespace fitcompress
