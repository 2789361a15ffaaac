// Sums of what the blocks of a Fisher kernel leave, in a fixed order.
#pragma once

#include "common/cuda.h"

namespace fitcompress {

// norms[b] += scale · Σ_part parts[b, part].
void add_norms(const double* parts, int64_t samples, int64_t count, double scale, double* norms,
               cudaStream_t queue);

// moment[i] += scale · Σ_slice slices[slice, i], i < size.
template <class Moment>
void add_moments(const double* slices, int64_t count, int64_t size, double scale, Moment* moment,
                 cudaStream_t queue);

// Where a kernel puts its squares: the moment itself, or for each slice of the samples a moment of
// its own, whose values are not set at first.
struct MomentSink {
  float* single;  // one of these, or none if only norms are wanted
  double* twice;
  double scale;
  int64_t slice;  // distance of the slices; 0: the moment itself

  __device__ bool wanted() const { return single != nullptr || twice != nullptr; }
  __device__ void add(int64_t slice_index, int64_t at, double value, bool first) const {
    const double scaled = scale * value;
    if (single != nullptr) {
      single[at] = static_cast<float>(single[at] + scaled);
    } else {
      double& to = twice[slice_index * slice + at];
      to = first && slice > 0 ? scaled : to + scaled;
    }
  }
};

// The samples cut into slices, for kernels that would else have too few blocks. Depends on shapes
// only, so that results do, too.
struct Slices {
  int64_t length, count;
};
// At least `shortest` samples each, and about `wanted` slices.
inline Slices cut_samples(int64_t samples, int64_t wanted, int64_t shortest) {
  const int64_t length = std::max({divide_up(samples, std::max<int64_t>(wanted, 1)), shortest});
  return {length, divide_up(samples, length)};
}

template <class Moment>
MomentSink make_sink(Moment* moment, int64_t slices, int64_t size, double scale,
                     const Scratch& scratch) {
  if (moment == nullptr) return {nullptr, nullptr, 0.0, 0};
  if (slices > 1) return {nullptr, allocate<double>(scratch, slices * size), 1.0, size};
  if constexpr (sizeof(Moment) == sizeof(float)) return {moment, nullptr, scale, 0};
  if constexpr (sizeof(Moment) == sizeof(double)) return {nullptr, moment, scale, 0};
}

}  // namespace fitcompress
