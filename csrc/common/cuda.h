// What every CUDA file needs: errors, the device of the call, sums over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/scratch.h"

namespace fitcompress {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA failed at ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

// Makes a device current for the time of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <class T>
T* allocate(const Scratch& scratch, int64_t count) {
  return static_cast<T*>(scratch(count * static_cast<int64_t>(sizeof(T))));
}

// The sum over a block of Threads threads, valid in thread 0, in a fixed order. Every thread calls
// it; may be called again at once.
template <int Threads, class T>
__device__ T block_sum(T value) {
  __shared__ T parts[Threads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = Threads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  const T total = parts[0];
  __syncthreads();
  return total;
}

// The sum over a warp, in every lane, in a fixed order. All lanes call it.
template <class T>
__device__ T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of blocks of a grid.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: the tensors need too many blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace fitcompress
