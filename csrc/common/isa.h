// One kernel, compiled for several instruction sets, chosen when it is called.
//
// dispatch_isa(kernel) calls kernel(lanes) with lanes = std::integral_constant<int, floats in a
// vector>. The kernel and all it calls must be FITCOMPRESS_INLINE: inlined into one of the
// functions below, it is compiled for that function's instruction set.
// FITCOMPRESS_ISA=default|avx2|avx512 in the environment lowers the choice.
#pragma once

#include <type_traits>
#include <utility>

#define FITCOMPRESS_INLINE inline __attribute__((always_inline))

namespace fitcompress {

enum class Isa { kDefault, kAvx2, kAvx512 };

// What this machine has and the environment allows; decided once.
Isa isa();
const char* name(Isa isa);

#if defined(__x86_64__)
template <class Kernel>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_avx512(Kernel& kernel) {
  kernel(std::integral_constant<int, 16>());
}

template <class Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(Kernel& kernel) {
  kernel(std::integral_constant<int, 8>());
}
#endif

template <class Kernel>
void dispatch_isa(Kernel&& kernel) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return run_avx512(kernel);
    case Isa::kAvx2:
      return run_avx2(kernel);
    case Isa::kDefault:
      break;
  }
#endif
  kernel(std::integral_constant<int, 4>());
}

}  // namespace fitcompress
