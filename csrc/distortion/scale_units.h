// Which weights share a scale: rows, the whole weight, or `group` consecutive columns of a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "distortion/distortion_table.h"

namespace fitcompress {

// Calls body(unit, first, last) for the runs of weights of [begin, end) that share a scale, in
// order of flat index.
template <class Body>
inline __attribute__((always_inline)) void for_each_run(const DistortionShape& shape, int64_t begin,
                                                        int64_t end, Body&& body) {
  if (begin >= end) return;
  if (shape.group < 0) {
    body(int64_t{0}, begin, end);
    return;
  }
  const int64_t width = shape.group == 0 ? shape.cols : std::min(shape.group, shape.cols);
  const int64_t a_row = (shape.cols + width - 1) / width;
  int64_t row = begin / shape.cols;
  int64_t group = begin % shape.cols / width;
  while (begin < end) {
    const int64_t run_end = row * shape.cols + std::min((group + 1) * width, shape.cols);
    const int64_t last = std::min(run_end, end);
    body(row * a_row + group, begin, last);
    begin = last;
    if (++group == a_row) {
      group = 0;
      ++row;
    }
  }
}

}  // namespace fitcompress
