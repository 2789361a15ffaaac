// Counts of weights by the leading 16 bits of their magnitude.
#pragma once

#include <cstdint>

namespace fitcompress {

// Bins of float32 bit patterns without sign: 8 bits of exponent, 7 of mantissa.
constexpr int64_t kMagnitudeBins = 1 << 15;

// counts: kMagnitudeBins, set by the call. What is not finite is in the bins from 0x7f80 on. T:
// float, BFloat16 or Float16.
template <class T>
void magnitude_histogram_cpu(const T* weight, int64_t count, int64_t* counts);

template <class T>
void magnitude_histogram_cuda(const T* weight, int64_t count, int64_t* counts, int device,
                              void* stream);

}  // namespace fitcompress
