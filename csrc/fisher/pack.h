// Packing of both tensors for square_accumulate_cpu: a box of places of some channels as panels,
// panel[place][lane], one for each vector of channels; or all inputs (c, k) of each position side
// by side. Lanes beyond the last channel hold anything and must not be used.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/transpose.h"
#include "fisher/square_plan.h"

namespace fitcompress {

struct Source {
  const float* data;
  int64_t lanes, lane_stride;
  std::array<int64_t, 3> size, stride;

  // With places that follow each other in memory in as few dimensions as possible.
  void merge() {
    for (const size_t i : {size_t{1}, size_t{0}}) {
      if (i == 0 && size[1] > 1) break;
      if (size[i] > 1 && size[2] > 1 && stride[i] != size[2] * stride[2]) break;
      if (size[2] == 1) stride[2] = stride[i];
      size[2] *= size[i];
      size[i] = 1;
    }
  }
};

// *to = every Step-th of N floats; reads no further than the last of them.
template <int Step, class Vector>
FITCOMPRESS_INLINE void load(const float* from, Vector* to) {
  constexpr size_t n = sizeof(Vector) / sizeof(float);
  std::memcpy(to, from, sizeof(Vector));
  if constexpr (Step == 2) {
    const Vector low = *to;
    Vector high;
    std::memcpy(&high, from + n - 1, sizeof(Vector));
    take_second(std::make_index_sequence<n>(), low, high, to);
  }
}

// `count` >= Width places of up to Width lanes, transposed; the last square may overlap.
template <int Width, int Step>
FITCOMPRESS_INLINE void pack_squares(const float* from, int64_t lane_stride, int64_t lanes,
                                     int64_t count, float* to) {
  for (int64_t next = 0; next < count; next += Width) {
    const int64_t begin = std::min(next, count - Width);
    typename VectorOf<Width>::Type square[Width];
    if (lanes == Width) {
#pragma GCC unroll 16
      for (int l = 0; l < Width; ++l) {
        load<Step>(from + begin * Step + l * lane_stride, &square[l]);
      }
    } else {
#pragma GCC unroll 16
      for (int64_t l = 0; l < Width; ++l) {
        load<Step>(from + begin * Step + std::min(l, lanes - 1) * lane_stride, &square[l]);
      }
    }
    transpose<Width>(square, to + begin * Width);
  }
}

template <int Width>
FITCOMPRESS_INLINE void pack_run(const float* from, int64_t lane_stride, int64_t lanes,
                                 int64_t stride, int64_t count, float* to) {
  if (stride == 1 && count >= Width) {
    pack_squares<Width, 1>(from, lane_stride, lanes, count, to);
  } else if (stride == 2 && count >= Width) {
    pack_squares<Width, 2>(from, lane_stride, lanes, count, to);
  } else {
    for (int64_t l = 0; l < Width; ++l) {
      const float* const lane = from + std::min(l, lanes - 1) * lane_stride;
      for (int64_t p = 0; p < count; ++p) to[p * Width + l] = lane[p * stride];
    }
  }
}

// Panels of Width lanes, panel_size apart.
template <int Width>
FITCOMPRESS_INLINE void pack(Source from, float* to, int64_t panel_size) {
  from.merge();
  const bool adjacent = from.lane_stride == 1 && (from.stride[2] != 1 || from.size[2] == 1);
  const int64_t whole = adjacent ? from.lanes / Width : 0;
  for (int64_t d = 0; d < from.size[0]; ++d) {
    for (int64_t h = 0; h < from.size[1]; ++h) {
      const float* const row = from.data + d * from.stride[0] + h * from.stride[1];
      if (adjacent) {
        for (int64_t p = 0; p < from.size[2]; ++p) {
          const float* const at = row + p * from.stride[2];
          for (int64_t v = 0; v < whole; ++v) {
            __builtin_prefetch(at + 8 * from.stride[2] + v * Width);
            std::memcpy(to + v * panel_size + p * Width, at + v * Width, Width * sizeof(float));
          }
        }
      }
      for (int64_t first = whole * Width; first < from.lanes; first += Width) {
        pack_run<Width>(row + first * from.lane_stride, from.lane_stride,
                        std::min<int64_t>(Width, from.lanes - first), from.stride[2], from.size[2],
                        to + first / Width * panel_size);
      }
      to += from.size[2] * Width;
    }
  }
}

// A box of all channels, one after the other, its rows without gaps.
FITCOMPRESS_INLINE void copy_box(const Source& from, float* to) {
  for (int64_t c = 0; c < from.lanes; ++c)
    for (int64_t d = 0; d < from.size[0]; ++d)
      for (int64_t h = 0; h < from.size[1]; ++h, to += from.size[2]) {
        const float* const row =
            from.data + c * from.lane_stride + d * from.stride[0] + h * from.stride[1];
        if (from.stride[2] == 1) {
          std::memcpy(to, row, static_cast<size_t>(from.size[2]) * sizeof(float));
        } else {
          for (int64_t w = 0; w < from.size[2]; ++w) to[w] = row[w * from.stride[2]];
        }
      }
}

// Copies rows of `length` <= Copy floats behind each other, at each position in turn. Copies are of
// one size: what is too much is overwritten by the next.
template <int Width, int Copy>
FITCOMPRESS_INLINE void unfold_rows(const float* stage, const int64_t* at, int64_t positions,
                                    const int64_t* rows, int64_t count, int64_t length,
                                    int64_t stride, float* to) {
  const int64_t last = (count * length - 1) / Width * Width;
  for (int64_t p = 0; p < positions; ++p, to += stride) {
    std::memset(to + last, 0, Width * sizeof(float));
    const float* const from = stage + at[p];
    float* next = to;
    for (int64_t r = 0; r < count; ++r, next += length) {
      std::memcpy(next, from + rows[r], Copy * sizeof(float));
    }
  }
}

// The inputs (c, k) of each position, `stride` floats apart, from the staged boxes: at[p] is where
// the window of position p begins, rows[r] where its r-th row lies in it.
template <int Width>
FITCOMPRESS_INLINE void unfold(const float* stage, const int64_t* at, int64_t positions,
                               const int64_t* rows, int64_t count, int64_t length, int64_t dilation,
                               int64_t stride, float* to) {
  if (dilation == 1 && length <= 4) {
    unfold_rows<Width, 4>(stage, at, positions, rows, count, length, stride, to);
  } else if (dilation == 1 && length <= 8) {
    unfold_rows<Width, 8>(stage, at, positions, rows, count, length, stride, to);
  } else if (dilation == 1 && length <= 16) {
    unfold_rows<Width, 16>(stage, at, positions, rows, count, length, stride, to);
  } else {
    const int64_t last = (count * length - 1) / Width * Width;
    for (int64_t p = 0; p < positions; ++p, to += stride) {
      std::memset(to + last, 0, Width * sizeof(float));
      float* next = to;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t w = 0; w < length; ++w) *next++ = stage[at[p] + rows[r] + w * dilation];
    }
  }
}

}  // namespace fitcompress
