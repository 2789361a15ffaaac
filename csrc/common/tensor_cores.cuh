// Asynchronous copies into shared memory, and the tensor cores: each instruction as a function.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fitcompress {

// Starts a copy of 16 bytes, both sides aligned; of zeros if not `inside`.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// Ends a batch of copies; batches arrive in order.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `Pending` batches of this thread have not arrived.
template <int Pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements for a warp. Lane l gives the address of row l % 8 of
// matrix l / 8, and gets of each matrix row l / 4, columns 2 (l % 4) and the next; of the
// transposed matrix if Transposed.
template <bool Transposed>
__device__ inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// sum += a · b for a 16 × 16, b 16 × 8. Lane l has of the sum the elements (l / 4, 2 (l % 4)), the
// one beside it, and the same two 8 rows below; of a the quarters (0, 0), (8, 0), (0, 8), (8, 8)
// and of the transposed b the halves (0, 0), (0, 8), each as load_matrices gives them.
#define FITCOMPRESS_MULTIPLY_ADD(T, NAME)                                                  \
  __device__ inline void multiply_add(T, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, \
                                      float& s0, float& s1, float& s2, float& s3) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"  \
                 : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));          \
  }
FITCOMPRESS_MULTIPLY_ADD(BFloat16, "bf16")
FITCOMPRESS_MULTIPLY_ADD(Float16, "f16")
#undef FITCOMPRESS_MULTIPLY_ADD

}  // namespace fitcompress
