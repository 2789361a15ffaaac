#include "common/parallel.h"

#include "torch/tensor.h"

namespace fitcompress {

void parallel_for_raw(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                      void* context) {
  if (count > 0) check_torch(torch_parallel_for(0, count, grain, body, context), "parallel_for");
}

}  // namespace fitcompress
