#include "fisher/ghost_norms.h"

#include "fisher/square_accumulate.h"

namespace fitcompress {

void ghost_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                     double scale, double* norms) {
  square_accumulate_cpu<double>(shape, output_grad, input, scale, nullptr, norms);
}

}  // namespace fitcompress
