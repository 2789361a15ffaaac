// A list of places of a tensor: where each is, and which runs of them are adjacent.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/isa.h"

namespace fitcompress {

// Places first, first + 1, … of the list: `at`, at + step, … in the tensor or the grid.
struct PlaceRun {
  int64_t first, length, at;
};

struct Places {
  explicit Places(int64_t capacity, int64_t step)
      : step(step),
        offsets_(make_buffer<int64_t>(capacity)),
        columns_(make_buffer<int64_t>(capacity)),
        runs_(make_buffer<PlaceRun>(capacity)),
        spans_(make_buffer<PlaceRun>(capacity)) {}

  void clear() { count = runs = spans = 0; }

  // `length` more places, at `offset` in the tensor and `column` in the grid.
  void add(int64_t offset, int64_t column, int64_t length) {
    extend(runs_.get(), &runs, offset, step, length);
    extend(spans_.get(), &spans, column, 1, length);
    for (int64_t i = 0; i < length; ++i) {
      offsets_[count + i] = offset + i * step;
      columns_[count + i] = column + i;
    }
    count += length;
  }

  const int64_t* offsets() const { return offsets_.get(); }
  const int64_t* columns() const { return columns_.get(); }
  const PlaceRun& run(int64_t i) const { return runs_[i]; }    // adjacent in the tensor
  const PlaceRun& span(int64_t i) const { return spans_[i]; }  // adjacent in the grid

  int64_t step;  // distance of neighbours in the tensor
  int64_t count = 0, runs = 0, spans = 0;

 private:
  void extend(PlaceRun* list, int64_t* size, int64_t at, int64_t apart, int64_t length) {
    if (*size > 0) {
      PlaceRun& last = list[*size - 1];
      if (last.at + last.length * apart == at) {
        last.length += length;
        return;
      }
    }
    list[(*size)++] = {count, length, at};
  }

  Buffer<int64_t> offsets_, columns_;
  Buffer<PlaceRun> runs_, spans_;
};

}  // namespace fitcompress
