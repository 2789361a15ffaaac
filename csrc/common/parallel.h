// Torch's thread pool, for kernels that know nothing of torch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fitcompress {

// Calls body(begin, end, context) for parts of [0, count), each at least `grain` long where
// possible, on the threads of torch.set_num_threads. How the range is cut depends on the number of
// threads: a result must not. The body must not throw.
void parallel_for_raw(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                      void* context);

// The same for any callable body(begin, end).
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  parallel_for_raw(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      &body);
}

}  // namespace fitcompress
