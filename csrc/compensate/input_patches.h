// Unfolding of a StridedMatrix into the cache, a tile of positions at a time: as rows, one for each
// feature, or as panels, panel[p][f], one for each vector of features.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/transpose.h"
#include "compensate/input_moments.h"

namespace fitcompress {

constexpr int64_t kTile = 256;  // positions summed in float32
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kRowStride = kTile + kMaxLanes;  // no power of two: rows in different cache sets

template <int Lanes>
constexpr int64_t panel_size() {  // floats; one more row for the same reason
  return (kTile + 1) * Lanes;
}

struct Dimension {
  int64_t size;
  int64_t stride;
};

// Positions that are `stride` apart in memory, as they follow each other in a tile.
struct Run {
  int64_t offset;
  int64_t length;
};

// A StridedMatrix prepared for unfolding.
struct Matrix {
  explicit Matrix(const StridedMatrix& from) : data(from.data), group_stride(from.group_stride) {
    const auto& size = from.feature_sizes;
    const auto& stride = from.feature_strides;
    for (int64_t c = 0; c < size[0]; ++c)
      for (int64_t d = 0; d < size[1]; ++d)
        for (int64_t h = 0; h < size[2]; ++h)
          for (int64_t w = 0; w < size[3]; ++w)
            offsets.push_back(c * stride[0] + d * stride[1] + h * stride[2] + w * stride[3]);
    features = static_cast<int64_t>(offsets.size());
    adjacent = true;
    for (int64_t f = 0; f < features; ++f) adjacent &= offsets[static_cast<size_t>(f)] == f;
    count = 1;
    for (int i = 0; i < 4; ++i) {
      const Dimension next{from.position_sizes[i], from.position_strides[i]};
      count *= next.size;
      if (next.size == 1) continue;
      if (!places.empty() && places.back().stride == next.size * next.stride) {
        places.back() = {places.back().size * next.size, next.stride};
      } else {
        places.push_back(next);
      }
    }
    if (places.empty()) places.push_back({1, 1});
    // Vectors are loaded along features, or along positions and then transposed.
    adjacent = adjacent && places.back().stride != 1;
  }

  // Splits positions [begin, begin + length) into runs; returns their number.
  int64_t split(int64_t begin, int64_t length, Run* runs) const {
    std::array<int64_t, 4> index{};
    const int last = static_cast<int>(places.size()) - 1;
    int64_t rest = begin;
    for (int i = last; i >= 0; --i) {
      index[static_cast<size_t>(i)] = rest % places[static_cast<size_t>(i)].size;
      rest /= places[static_cast<size_t>(i)].size;
    }
    int64_t filled = 0;
    while (length > 0) {
      int64_t offset = 0;
      for (size_t i = 0; i < places.size(); ++i) offset += index[i] * places[i].stride;
      const size_t inner = places.size() - 1;
      const int64_t now = std::min(length, places[inner].size - index[inner]);
      runs[filled++] = {offset, now};
      length -= now;
      index[inner] = 0;
      for (size_t i = inner; i-- > 0;) {
        if (++index[i] < places[i].size) break;
        index[i] = 0;
      }
    }
    return filled;
  }

  const float* data;
  int64_t group_stride;
  int64_t features, count;  // of one group; positions
  bool adjacent;            // feature f lies f floats after the first, and positions do not
  std::vector<int64_t> offsets;
  std::vector<Dimension> places;  // dimensions of positions, merged where that is possible
};

FITCOMPRESS_INLINE void copy_adjacent(const float* from, int64_t length, float*& to) {
  for (; length >= 16; length -= 16, from += 16, to += 16) std::memcpy(to, from, 64);
  if (length & 8) std::memcpy(to, from, 32), from += 8, to += 8;
  if (length & 4) std::memcpy(to, from, 16), from += 4, to += 4;
  if (length & 2) std::memcpy(to, from, 8), from += 2, to += 2;
  if (length & 1) *to++ = *from;
}

// to[i] = from[2 i], as many whole vectors as there are; reads no further than the last of them.
template <int N>
FITCOMPRESS_INLINE void copy_every_second(const float*& from, int64_t& length, float*& to) {
  using Vector = typename VectorOf<N>::Type;
  for (; length >= N; length -= N, from += 2 * N, to += N) {
    Vector low, high, both;
    std::memcpy(&low, from, sizeof(Vector));
    std::memcpy(&high, from + N - 1, sizeof(Vector));
    take_second(std::make_index_sequence<N>(), low, high, &both);
    std::memcpy(to, &both, sizeof(Vector));
  }
}

// to[i] = feature at position i of a tile, for the positions of all runs.
template <int Lanes>
FITCOMPRESS_INLINE void unfold_row(const float* from, int64_t stride, const Run* runs,
                                   int64_t count, float* to) {
  for (int64_t r = 0; r < count; ++r) {
    const float* at = from + runs[r].offset;
    int64_t length = runs[r].length;
    if (stride == 1) {
      copy_adjacent(at, length, to);
    } else {
      if (stride == 2) {
        copy_every_second<Lanes>(at, length, to);
        if constexpr (Lanes > 8) copy_every_second<8>(at, length, to);
        if constexpr (Lanes > 4) copy_every_second<4>(at, length, to);
      }
      for (; length > 0; --length, at += stride) *to++ = *at;
    }
  }
}

// Features [first, first + width) of positions [begin, begin + length) as panels, zero beyond the
// features. `runs` [kTile] and `rows` [Lanes, kRowStride] are work space.
template <int Lanes>
FITCOMPRESS_INLINE void unfold(const Matrix& matrix, int64_t group, int64_t first, int64_t width,
                               int64_t begin, int64_t length, Run* runs, float* rows,
                               float* panels) {
  const int64_t count = matrix.split(begin, length, runs);
  const float* const data = matrix.data + group * matrix.group_stride;
  const int64_t stride = matrix.places.back().stride;
  const int64_t* const offsets = matrix.offsets.data() + first;
  if (matrix.adjacent) {
    float* to = panels;
    const int64_t whole = width / Lanes, rest = width % Lanes;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = data + first + runs[r].offset;
      for (int64_t p = 0; p < runs[r].length; ++p, from += stride, to += Lanes) {
        for (int64_t v = 0; v < whole; ++v) {
          __builtin_prefetch(from + 8 * stride + v * Lanes);
          std::memcpy(to + v * panel_size<Lanes>(), from + v * Lanes, Lanes * sizeof(float));
        }
        if (rest == 0) continue;
        float* const tail = to + whole * panel_size<Lanes>();
        for (int64_t f = 0; f < rest; ++f) tail[f] = from[whole * Lanes + f];
        for (int64_t f = rest; f < Lanes; ++f) tail[f] = 0.0f;
      }
    }
    return;
  }
  for (int64_t panel = 0; panel < width; panel += Lanes) {
    for (int64_t f = 0; f < Lanes; ++f) {
      float* row = rows + f * kRowStride;
      if (panel + f >= width) {
        std::memset(row, 0, kTile * sizeof(float));
        continue;
      }
      unfold_row<Lanes>(data + offsets[panel + f], stride, runs, count, row);
    }
    float* const to = panels + panel / Lanes * panel_size<Lanes>();
    for (int64_t p = 0; p < length; p += Lanes) {
      const auto row = [=](int i)
                           __attribute__((always_inline)) { return rows + p + i * kRowStride; };
      transpose<Lanes>(row, to + p * Lanes);
    }
  }
}

// The same as rows, kRowStride apart, with zeros up to a whole vector of positions.
template <int Lanes>
FITCOMPRESS_INLINE void unfold_rows(const Matrix& matrix, int64_t group, int64_t begin,
                                    int64_t length, Run* runs, float* rows) {
  const int64_t count = matrix.split(begin, length, runs);
  const float* const data = matrix.data + group * matrix.group_stride;
  for (int64_t f = 0; f < matrix.features; ++f, rows += kRowStride) {
    unfold_row<Lanes>(data + matrix.offsets[static_cast<size_t>(f)], matrix.places.back().stride,
                      runs, count, rows);
    for (int64_t p = length; p < round_up(length, Lanes); ++p) rows[p] = 0.0f;
  }
}

}  // namespace fitcompress
