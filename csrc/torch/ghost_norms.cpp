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
  const auto on_cpu = [&] {
    const WidenedPair pair(shape, output_grad, input);
    ghost_norms_cpu(pair.shape, pair.output_grad, pair.input, scale, totals.data<double>());
  };
  FITCOMPRESS_DISPATCH(input, on_cpu(),
                       dispatch_float(kOp, "input", input.dtype(), [&](auto element) {
                         using T = decltype(element);
                         ghost_norms_cuda(shape, output_grad.data<T>(), input.data<T>(), scale,
                                          totals.data<double>(), ScratchOn(input),
                                          input.device_index(), current_stream(input));
                       }));
  if (totals.data() != norms.data()) norms.copy_(totals);
}

}  // namespace fitcompress
