#include "quantize/fake_quantize_prune.h"

#include <limits>

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {
namespace {

QuantizePruneShape check_arguments(const char* op, const Tensor& weight, const Tensor& scale,
                                   const std::optional<Tensor>& mask, int64_t max_code) {
  const int64_t count = weight.numel();
  const int64_t first_dim = weight.dim() == 0 ? 1 : weight.size(0);
  const int64_t scales = scale.numel();
  require(scales == 1 || scales == first_dim, op, ": scale must have 1 element or one a row, ",
          first_dim, ", got ", scales);
  require_dtype(op, "scale", scale, Dtype::kFloat32);
  require_device(op, "scale", scale, weight);
  if (mask) {
    require_dtype(op, "mask", *mask, Dtype::kUInt8);
    require_sizes(op, "mask (one bit a weight)", *mask, {(count + 7) / 8});
    require_device(op, "mask", *mask, weight);
  }
  const float q =
      max_code > 0 ? static_cast<float>(max_code) : std::numeric_limits<float>::infinity();
  return {scales, scales == 0 ? 0 : count / scales, q};
}

const uint8_t* data_or_null(const std::optional<Tensor>& mask) {
  return mask ? mask->data<uint8_t>() : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& mask) {
  if (!mask) return std::nullopt;
  return mask->contiguous();
}

}  // namespace

Tensor fake_quantize_prune(const Tensor& weight, const Tensor& scale,
                           const std::optional<Tensor>& mask, int64_t max_code) {
  constexpr const char* kOp = "fake_quantize_prune";
  const QuantizePruneShape shape = check_arguments(kOp, weight, scale, mask, max_code);
  const Tensor weights = weight.contiguous();
  const Tensor scales = scale.contiguous();
  const std::optional<Tensor> bits = contiguous(mask);
  Tensor result = weight.empty(weight.sizes(), weight.dtype());
  dispatch_float(kOp, "weight", weight.dtype(), [&](auto element) {
    using T = decltype(element);
    FITCOMPRESS_DISPATCH(
        weight,
        fake_quantize_prune_cpu(shape, weights.data<T>(), scales.data<float>(), data_or_null(bits),
                                result.data<T>()),
        fake_quantize_prune_cuda(shape, weights.data<T>(), scales.data<float>(), data_or_null(bits),
                                 result.data<T>(), weight.device_index(), current_stream(weight)));
  });
  return result;
}

std::tuple<Tensor, Tensor> fake_quantize_prune_backward(const Tensor& grad, const Tensor& weight,
                                                        const Tensor& scale,
                                                        const std::optional<Tensor>& mask,
                                                        int64_t max_code) {
  constexpr const char* kOp = "fake_quantize_prune_backward";
  const QuantizePruneShape shape = check_arguments(kOp, weight, scale, mask, max_code);
  require_sizes(kOp, "grad", grad, weight.sizes());
  require_dtype(kOp, "grad", grad, weight.dtype());
  require_device(kOp, "grad", grad, weight);
  const Tensor grads = grad.contiguous();
  const Tensor weights = weight.contiguous();
  const Tensor scales = scale.contiguous();
  const std::optional<Tensor> bits = contiguous(mask);
  Tensor grad_weight = weight.empty(weight.sizes(), weight.dtype());
  Tensor grad_scale = scale.empty(scale.sizes(), Dtype::kFloat32);
  dispatch_float(kOp, "weight", weight.dtype(), [&](auto element) {
    using T = decltype(element);
    FITCOMPRESS_DISPATCH(weight,
                         fake_quantize_prune_backward_cpu(
                             shape, grads.data<T>(), weights.data<T>(), scales.data<float>(),
                             data_or_null(bits), grad_weight.data<T>(), grad_scale.data<float>()),
                         fake_quantize_prune_backward_cuda(
                             shape, grads.data<T>(), weights.data<T>(), scales.data<float>(),
                             data_or_null(bits), grad_weight.data<T>(), grad_scale.data<float>(),
                             weight.device_index(), current_stream(weight), ScratchOn(weight)));
  });
  return {std::move(grad_weight), std::move(grad_scale)};
}

}  // namespace fitcompress
