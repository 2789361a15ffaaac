#include "fisher/winograd_norms.h"

#include "torch/adapters.h"
#include "torch/device.h"
#include "torch/weight_grad.h"

namespace fitcompress {

void winograd_norms_(const Tensor& norms, const Tensor& output_grad, const Tensor& input,
                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                     double scale) {
  constexpr const char* kOp = "winograd_norms_";
  const WeightGradShape shape =
      weight_grad_shape(kOp, output_grad, input, kernel, stride, dilation, groups, images);
  require_norms(kOp, norms, shape, output_grad);
  const std::vector<int64_t> wanted_kernel{1, 3, 3}, ones{1, 1, 1};
  require(kernel == wanted_kernel && stride == ones && dilation == ones, kOp, ": kernel must be ",
          wanted_kernel, ", stride and dilation ", ones, ", got ", kernel, ", ", stride, " and ",
          dilation);
  require(groups == 1, kOp, ": groups must be 1, got ", groups);
  require(shape.places[0] <= 1, kOp, ": output_grad must have depth 1, got ", shape.places[0]);
  const Tensor totals = norms.contiguous();  // norms itself, if it is contiguous
  const WidenedPair pair(shape, output_grad, input);
  winograd_norms_cpu(pair.shape, pair.output_grad, pair.input, scale, totals.data<double>());
  if (totals.data() != norms.data()) norms.copy_(totals);
}

}  // namespace fitcompress
