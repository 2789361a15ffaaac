// From a matrix with one column for each place to one with a column for each number of the grid.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/transpose.h"
#include "fisher/ghost_places.h"

namespace fitcompress {

// Vector v of the result is made of the columns from start[v] on, rearranged by `index`, and zero
// where `mask` is.
struct SpreadTable {
  int64_t* start;
  int32_t* index;
  int32_t* mask;
};

// Moves the columns of a matrix to their numbers, with zeros between them and after the last, up to
// `width`, from right to left. With `upper`, of a row only what is on and right of the diagonal.
template <int Lanes>
FITCOMPRESS_INLINE void spread(int64_t rows, const Places& columns, bool upper, int64_t width,
                               float* matrix, int64_t stride, const SpreadTable& table) {
  using Vector = typename VectorOf<Lanes>::Type;
  using Indices = typename VectorOf<Lanes>::Indices;
  const int64_t vectors = (width + Lanes - 1) / Lanes;
  if (columns.spans == 1 && columns.span(0).at == 0) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(matrix + r * stride + columns.count, matrix + r * stride + vectors * Lanes, 0.0f);
    }
    return;
  }
  std::fill(table.mask, table.mask + vectors * Lanes, 0);
  std::fill(table.index, table.index + vectors * Lanes, 0);
  std::fill(table.start, table.start + vectors, int64_t{0});
  for (int64_t p = columns.count; p-- > 0;) table.start[columns.columns()[p] / Lanes] = p;
  for (int64_t p = 0; p < columns.count; ++p) {
    const int64_t column = columns.columns()[p];
    table.mask[column] = -1;
    table.index[column] = static_cast<int32_t>(p - table.start[column / Lanes]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = matrix + r * stride;
    const int64_t first = upper ? columns.columns()[r] / Lanes : 0;
    for (int64_t v = vectors; v-- > first;) {
      Vector value;
      Indices index, mask;
      std::memcpy(&value, row + table.start[v], sizeof(value));
      std::memcpy(&index, table.index + v * Lanes, sizeof(index));
      std::memcpy(&mask, table.mask + v * Lanes, sizeof(mask));
      permute<Lanes>(&value, index);
      const Indices result = reinterpret_cast<Indices>(value) & mask;
      std::memcpy(row + v * Lanes, &result, sizeof(result));
    }
  }
}

}  // namespace fitcompress
