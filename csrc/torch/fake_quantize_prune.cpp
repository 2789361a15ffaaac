#include "quantize/fake_quantize_prune.h"

#include <algorithm>
#include <limits>

#include "common/buffer.h"
#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {
namespace {

// Group 0 is the whole row.
QuantizePruneShape check_arguments(const char* op, const Tensor& weight, const Tensor& scale,
                                   const std::optional<Tensor>& mask, int64_t max_code,
                                   std::optional<int64_t> min_code, int64_t group, bool regrow) {
  const int64_t count = weight.numel();
  const int64_t first_dim = weight.dim() == 0 ? 1 : weight.size(0);
  const int64_t cols = first_dim == 0 ? 0 : count / first_dim;
  require(group >= 0, op, ": group must be a number of columns, or 0 for the row, got ", group);
  const int64_t whole = std::max<int64_t>(cols, 1);
  const int64_t width = group == 0 ? whole : std::min(group, whole);
  const int64_t per_row = group == 0 ? 1 : (cols + width - 1) / width;
  const int64_t scales = scale.numel();
  if (group == 0) {
    require(scales == 1 || scales == first_dim, op, ": scale must have 1 element or one a row, ",
            first_dim, ", got ", scales);
  } else {
    require(scales == 1 || scales == first_dim * per_row, op,
            ": scale must have 1 element or one for each ", group, " columns of a row, ",
            first_dim * per_row, ", got ", scales);
  }
  require_dtype(op, "scale", scale, Dtype::kFloat32);
  require_device(op, "scale", scale, weight);
  if (mask) {
    require_dtype(op, "mask", *mask, Dtype::kUInt8);
    require_sizes(op, "mask (one bit a weight)", *mask, {(count + 7) / 8});
    require_device(op, "mask", *mask, weight);
  }
  const bool bounded = max_code > 0;
  const int64_t low = min_code.value_or(-std::max<int64_t>(max_code, 0));
  require(low <= 0, op, ": min_code must be at most 0, got ", low);
  require(bounded || !min_code, op, ": min_code needs a max_code above 0, got ", max_code);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  QuantizePruneShape shape{first_dim, cols, width, -kInfinity, kInfinity, regrow};
  if (bounded) {
    shape.min_code = static_cast<float>(low);
    shape.max_code = static_cast<float>(max_code);
  }
  if (scales == 1 || count == 0) {
    shape.rows = scales;
    shape.cols = count;
    shape.width = std::max<int64_t>(count, 1);
  }
  return shape;
}

// A contiguous result that is about to be written once, from end to end.
Tensor empty_like(const Tensor& weight) {
  Tensor result = weight.empty(weight.sizes(), weight.dtype());
  if (!weight.is_cuda()) {
    const size_t width = weight.dtype() == Dtype::kFloat32 ? 4 : 2;
    advise_huge_pages(result.data(), width * static_cast<size_t>(weight.numel()));
  }
  return result;
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
                           const std::optional<Tensor>& mask, int64_t max_code,
                           std::optional<int64_t> min_code, int64_t group, bool regrow) {
  constexpr const char* kOp = "fake_quantize_prune";
  const QuantizePruneShape shape =
      check_arguments(kOp, weight, scale, mask, max_code, min_code, group, regrow);
  const Tensor weights = weight.contiguous();
  const Tensor scales = scale.contiguous();
  const std::optional<Tensor> bits = contiguous(mask);
  Tensor result = empty_like(weight);
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
                                                        int64_t max_code,
                                                        std::optional<int64_t> min_code,
                                                        int64_t group, bool regrow) {
  constexpr const char* kOp = "fake_quantize_prune_backward";
  const QuantizePruneShape shape =
      check_arguments(kOp, weight, scale, mask, max_code, min_code, group, regrow);
  require_sizes(kOp, "grad", grad, weight.sizes());
  require_dtype(kOp, "grad", grad, weight.dtype());
  require_device(kOp, "grad", grad, weight);
  const Tensor grads = grad.contiguous();
  const Tensor weights = weight.contiguous();
  const Tensor scales = scale.contiguous();
  const std::optional<Tensor> bits = contiguous(mask);
  Tensor grad_weight = empty_like(weight);
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
