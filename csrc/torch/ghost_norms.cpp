#include "fisher/ghost_norms.h"

#include "torch/adapters.h"
#include "torch/device.h"
#include "torch/weight_grad.h"

namespace fitcompress {

void ghost_norms_(const Tensor& norms, const Tensor& output_grad, const Tensor& input,
                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                  double scale) {
  constexpr const char* kOp = "ghost_norms_";
  const WeightGradShape shape =
      weight_grad_shape(kOp, output_grad, input, kernel, stride, dilation, groups, images);
  require_norms(kOp, norms, shape, output_grad);
  const Tensor totals = norms.contiguous();  // norms itself, if it is contiguous
  const WidenedPair pair(shape, output_grad, input);
  ghost_norms_cpu(pair.shape, pair.output_grad, pair.input, scale, totals.data<double>());
  if (totals.data() != norms.data()) norms.copy_(totals);
}

}  // namespace fitcompress
