#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fitcompress {
namespace {

Isa detect() {
  Isa best = Isa::kDefault;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* wanted = std::getenv("FITCOMPRESS_ISA");
  if (wanted == nullptr) return best;
  for (const Isa candidate : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(wanted, name(candidate)) == 0) return std::min(best, candidate);
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* name(Isa isa) {
  constexpr const char* kNames[] = {"default", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace fitcompress
