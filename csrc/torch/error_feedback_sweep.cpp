#include "compensate/error_feedback_sweep.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "compensate/beam_sweep.h"
#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {

Tensor error_feedback_sweep(const Tensor& weight, const Tensor& factor, const Tensor& scale,
                            const std::optional<Tensor>& mask, int64_t max_code, int64_t beam,
                            const std::optional<Tensor>& bits, double rate) {
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

  constexpr int64_t kMostPaths = 1024;
  require(beam >= 1 && beam <= kMostPaths, kOp, ": beam must be 1 to ", kMostPaths, ", got ", beam);
  require(rate >= 0.0 && std::isfinite(rate), kOp, ": rate must be finite and not negative, got ",
          rate);
  require(rate == 0.0 || bits, kOp, ": a rate needs the bits of the codes, got none");
  double q = max_code > 0 ? static_cast<double>(max_code) : std::numeric_limits<double>::infinity();
  std::optional<Tensor> table;
  if (bits) {
    require_dtype(kOp, "bits", *bits, Dtype::kFloat64);
    require(bits->dim() == 1 && bits->numel() % 2 == 1, kOp,
            ": bits must be those of the codes -h to h, 2h + 1 of them, got ", bits->sizes());
    require_device(kOp, "bits", *bits, weight);
    table.emplace(bits->contiguous());
    q = std::min(q, static_cast<double>(bits->numel() / 2));
  }
  const SweepShape shape{rows, cols, scales != 1, q};
  const Tensor factors = factor.contiguous();
  const Tensor steps = scale.contiguous();
  Tensor codes = weight.empty(weight.sizes(), Dtype::kInt32);
  const auto* const kept = keep ? static_cast<const uint8_t*>(keep->data()) : nullptr;
  bool ok = true;
  if (beam == 1 && rate == 0.0) {
    const Tensor work = weight.empty(weight.sizes(), Dtype::kFloat64);
    work.copy_(weight);
    FITCOMPRESS_DISPATCH(
        weight,
        ok = error_feedback_sweep_cpu(shape, work.data<double>(), factors.data<double>(),
                                      steps.data<double>(), kept, codes.data<int32_t>()),
        ok = error_feedback_sweep_cuda(shape, work.data<double>(), factors.data<double>(),
                                       steps.data<double>(), kept, codes.data<int32_t>(),
                                       weight.device_index(), current_stream(weight),
                                       ScratchOn(weight)));
  } else {
    const Tensor start = weight.contiguous();
    const double* const middle = table ? table->data<double>() + table->numel() / 2 : nullptr;
    const BeamSweep sweep{shape, beam, rate, middle};
    FITCOMPRESS_DISPATCH(
        weight,
        ok = beam_sweep_cpu(sweep, start.data<double>(), factors.data<double>(),
                            steps.data<double>(), kept, codes.data<int32_t>()),
        ok = beam_sweep_cuda(sweep, start.data<double>(), factors.data<double>(),
                             steps.data<double>(), kept, codes.data<int32_t>(),
                             weight.device_index(), current_stream(weight), ScratchOn(weight)));
  }
  require(
      ok, kOp,
      ": a code is not a finite 32-bit integer, or a cost not finite; weight, scale and bits must "
      "be finite, the diagonal of factor positive, and the scale large enough");
  return codes;
}

}  // namespace fitcompress
