#include "compensate/error_feedback_sweep.h"

#include <limits>

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {

Tensor error_feedback_sweep(const Tensor& weight, const Tensor& factor, const Tensor& scale,
                            const std::optional<Tensor>& mask, int64_t max_code) {
  constexpr const char* kOp = "error_feedback_sweep";
  require(weight.dim() == 2, kOp, ": weight must be [rows, columns], got ", weight.sizes());
  const int64_t rows = weight.size(0), cols = weight.size(1), scales = scale.numel();
  require_dtype(kOp, "weight", weight, Dtype::kFloat64);
  require_dtype(kOp, "factor", factor, Dtype::kFloat64);
  require_dtype(kOp, "scale", scale, Dtype::kFloat64);
  require_sizes(kOp, "factor", factor, {cols, cols});
  require(scales == 1 || scales == rows, kOp, ": scale must have 1 element or one a row, ", rows,
          ", got ", scales);
  require_device(kOp, "factor", factor, weight);
  require_device(kOp, "scale", scale, weight);
  std::optional<Tensor> keep;
  if (mask) {
    require_sizes(kOp, "mask", *mask, weight.sizes());
    require(mask->dtype() == Dtype::kBool || mask->dtype() == Dtype::kUInt8, kOp,
            ": mask must be bool or uint8, got ", name(mask->dtype()));
    require_device(kOp, "mask", *mask, weight);
    keep.emplace(mask->contiguous());
  }

  const double q =
      max_code > 0 ? static_cast<double>(max_code) : std::numeric_limits<double>::infinity();
  const SweepShape shape{rows, cols, scales != 1, q};
  const Tensor factors = factor.contiguous();
  const Tensor steps = scale.contiguous();
  const Tensor work = weight.empty(weight.sizes(), Dtype::kFloat64);
  work.copy_(weight);
  Tensor codes = weight.empty(weight.sizes(), Dtype::kInt32);
  const auto* const kept = keep ? static_cast<const uint8_t*>(keep->data()) : nullptr;
  bool ok = true;
  FITCOMPRESS_DISPATCH(
      weight,
      ok = error_feedback_sweep_cpu(shape, work.data<double>(), factors.data<double>(),
                                    steps.data<double>(), kept, codes.data<int32_t>()),
      ok = error_feedback_sweep_cuda(
          shape, work.data<double>(), factors.data<double>(), steps.data<double>(), kept,
          codes.data<int32_t>(), weight.device_index(), current_stream(weight), ScratchOn(weight)));
  require(ok, kOp,
          ": a code is not a finite 32-bit integer; weight and scale must be finite, the diagonal "
          "of factor positive, and the scale large enough");
  return codes;
}

}  // namespace fitcompress
