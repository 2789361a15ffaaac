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

    input_panels = ceil_div(shape.channels, width);
    grad_panels = ceil_div(outputs, width);
    // Odd numbers of vectors: panels begin in different cache sets.
    panel = (box[0] * box[1] | 1) * width;
    input_stride = (input_panels | 1) * panel;
    grad_stride = (grad_panels | 1) * panel;
    stage = (box[0] * kTile + 2) * (box[1] * kTile + 2) * width;

    rows = std::min(kRows, round_up(outputs, width));
    vectors = ceil_div(even_block(shape.channels, kColumns, width), width);
    row_stride = vectors * width;
    product_stride = (rows * vectors | 1) * width;
    row_blocks = ceil_div(outputs, rows);
    column_blocks = ceil_div(input_panels, vectors);
    block_size = kPoints * product_stride;
    kept_blocks = segments > 1 ? row_blocks * column_blocks : 1;
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
  static constexpr int64_t kTasks = 32;                // wanted
  static constexpr int64_t kRows = 32, kColumns = 64;  // outputs and channels of a block

  const WeightGradShape& shape;
  int64_t width;  // lanes of a vector
  int64_t cuts[2], box[2], segments;
  int64_t outputs, output_splits, tasks;
  // Of the transforms [36][panels][tiles][width]:
  int64_t input_panels, grad_panels, panel, input_stride, grad_stride;
  int64_t stage;  // floats of a packed box
  // Of the products [36][rows][vectors][width]:
  int64_t rows, vectors, row_stride, product_stride;
  int64_t row_blocks, column_blocks, block_size, kept_blocks;
};

}  // namespace fitcompress
