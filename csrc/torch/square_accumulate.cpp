#include "fisher/square_accumulate.h"

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {

void square_accumulate_(const Tensor& moment, const Tensor& output_grad, const Tensor& input) {
  constexpr const char* kOp = "square_accumulate_";
  require(output_grad.dim() == 3, kOp, ": output_grad must be [samples, positions, outputs], got ",
          output_grad.sizes());
  require(input.dim() == 3, kOp, ": input must be [samples, positions, inputs], got ",
          input.sizes());
  const SquareAccumulateShape shape{output_grad.size(0), output_grad.size(1), output_grad.size(2),
                                    input.size(2)};
  require_sizes(kOp, "input", input, {shape.samples, shape.positions, shape.inputs});
  require_sizes(kOp, "moment", moment, {shape.outputs, shape.inputs});
  require_dtype(kOp, "input (like output_grad)", input, output_grad.dtype());
  require(moment.dtype() == Dtype::kFloat32 || moment.dtype() == Dtype::kFloat64, kOp,
          ": moment must be float32 or float64, got ", name(moment.dtype()));
  require_device(kOp, "output_grad", output_grad, moment);
  require_device(kOp, "input", input, moment);

  const Tensor grads = output_grad.contiguous();
  const Tensor inputs = input.contiguous();
  const Tensor sums = moment.contiguous();  // moment itself, if it is contiguous
  dispatch_float(kOp, "output_grad", grads.dtype(), [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto* to) {
      FITCOMPRESS_DISPATCH(moment,
                           square_accumulate_cpu(shape, grads.data<T>(), inputs.data<T>(), to),
                           square_accumulate_cuda(shape, grads.data<T>(), inputs.data<T>(), to,
                                                  moment.device_index(), current_stream(moment)));
    };
    if (sums.dtype() == Dtype::kFloat32) {
      run(sums.data<float>());
    } else {
      run(sums.data<double>());
    }
  });
  if (sums.data() != moment.data()) moment.copy_(sums);
}

}  // namespace fitcompress
