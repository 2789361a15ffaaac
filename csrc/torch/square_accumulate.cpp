#include "fisher/square_accumulate.h"

#include "torch/adapters.h"
#include "torch/device.h"
#include "torch/weight_grad.h"

namespace fitcompress {

void square_accumulate_(const std::optional<Tensor>& moment, const std::optional<Tensor>& norms,
                        const Tensor& output_grad, const Tensor& input,
                        const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                        double scale) {
  constexpr const char* kOp = "square_accumulate_";
  const WeightGradShape shape =
      weight_grad_shape(kOp, output_grad, input, kernel, stride, dilation, groups, images);
  if (norms) require_norms(kOp, *norms, shape, output_grad);
  if (moment) {
    require(moment->dtype() == Dtype::kFloat32 || moment->dtype() == Dtype::kFloat64, kOp,
            ": moment must be float32 or float64, got ", name(moment->dtype()));
    require_sizes(kOp, "moment", *moment, {groups * shape.outputs, shape.inputs()});
    require_device(kOp, "moment", *moment, output_grad);
  }
  if (!moment && !norms) return;

  // Themselves, if they are contiguous.
  std::optional<Tensor> sums, totals;
  if (moment) sums.emplace(moment->contiguous());
  if (norms) totals.emplace(norms->contiguous());
  double* const to_norms = norms ? totals->data<double>() : nullptr;
  const auto on_cpu = [&](auto* to) {
    const WidenedPair pair(shape, output_grad, input);
    square_accumulate_cpu(pair.shape, pair.output_grad, pair.input, scale, to, to_norms);
  };
  const auto run = [&](auto* to) {
    FITCOMPRESS_DISPATCH(
        input, on_cpu(to), dispatch_float(kOp, "input", input.dtype(), [&](auto element) {
          using T = decltype(element);
          square_accumulate_cuda(shape, output_grad.data<T>(), input.data<T>(), scale, to, to_norms,
                                 ScratchOn(input), input.device_index(), current_stream(input));
        }));
  };
  if (moment && sums->dtype() == Dtype::kFloat32) {
    run(sums->data<float>());
  } else {
    run(moment ? sums->data<double>() : nullptr);
  }
  if (moment && sums->data() != moment->data()) moment->copy_(*sums);
  if (norms && totals->data() != norms->data()) norms->copy_(*totals);
}

}  // namespace fitcompress
