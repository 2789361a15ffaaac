#include "distortion/distortion_table.h"

#include <algorithm>
#include <cmath>

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {
namespace {

constexpr const char* kOp = "distortion_table";

void check_like_weight(const char* what, const std::optional<Tensor>& tensor,
                       const Tensor& weight) {
  if (!tensor) return;
  require_sizes(kOp, what, *tensor, weight.sizes());
  require_dtype(kOp, what, *tensor, Dtype::kFloat32);
  require_device(kOp, what, *tensor, weight);
}

void check_grids(const std::vector<int64_t>& bits, const std::vector<double>& steps,
                 DistortionShape* shape) {
  for (const int64_t b : bits) {
    require(b >= 2 && b <= 16, kOp, ": bits must be between 2 and 16, got ", b);
    shape->grids.push_back({b, 0.0});
  }
  for (const double step : steps) {
    require(std::isfinite(step) && static_cast<float>(step) > 0.0f &&
                std::isfinite(static_cast<float>(step)),
            kOp, ": steps must be positive float32 numbers, got ", step);
    shape->grids.push_back({0, step});
  }
}

void check_sparsities(const std::vector<double>& sparsities, DistortionShape* shape) {
  double previous = 0.0;
  for (const double sparsity : sparsities) {
    require(sparsity >= previous && sparsity < 1.0, kOp,
            ": sparsities must ascend within [0, 1), got ", sparsity, " after ", previous);
    previous = sparsity;
    shape->dropped.push_back(
        static_cast<int64_t>(std::floor(sparsity * static_cast<double>(shape->count()))));
  }
  require(sparsities.size() < 32768, kOp, ": at most 32767 sparsities, got ", sparsities.size());
}

void check_scales(const std::vector<double>& clips, DistortionShape* shape) {
  require(!clips.empty(), kOp, ": clips must hold at least one number");
  for (const double clip : clips) {
    // Far smaller ones would have infinitely many codes a unit in float32.
    require(clip >= 1e-30 && clip <= 1.0, kOp, ": clips must be in [1e-30, 1], got ", clip);
    shape->clips.push_back(static_cast<float>(clip));
  }
  require(shape->group >= -1, kOp,
          ": group must be a number of columns, 0 for the row or -1 for the tensor, got ",
          shape->group);
  shape->group = std::min(shape->group, std::max<int64_t>(shape->cols, 1));
}

DistortionShape check_arguments(const Tensor& weight, const std::vector<int64_t>& bits,
                                const std::vector<double>& steps,
                                const std::vector<double>& sparsities,
                                const std::vector<double>& clips, double smoothing, int64_t group,
                                double dead_zone) {
  require(weight.dim() == 2, kOp, ": weight must be [rows, columns], got ", weight.sizes());
  DistortionShape shape{};
  shape.rows = weight.size(0);
  shape.cols = weight.size(1);
  shape.smoothing = smoothing;
  shape.group = group;
  shape.dead_zone = static_cast<float>(dead_zone);
  require(smoothing >= 0.0, kOp, ": smoothing must be at least 0, got ", smoothing);
  require(dead_zone >= 0.5 && std::isfinite(shape.dead_zone), kOp,
          ": dead_zone must be at least 0.5 and finite, got ", dead_zone);
  check_grids(bits, steps, &shape);
  check_sparsities(sparsities, &shape);
  check_scales(clips, &shape);
  return shape;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return tensor->contiguous();
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data<float>() : nullptr;
}

}  // namespace

DistortionTensors distortion_table(const Tensor& weight, const std::optional<Tensor>& fisher,
                                   const std::optional<Tensor>& importance,
                                   const std::vector<int64_t>& bits,
                                   const std::vector<double>& steps,
                                   const std::vector<double>& sparsities,
                                   const std::vector<double>& clips, double smoothing,
                                   int64_t group, double dead_zone) {
  const DistortionShape shape =
      check_arguments(weight, bits, steps, sparsities, clips, smoothing, group, dead_zone);
  check_like_weight("fisher", fisher, weight);
  check_like_weight("importance", importance, weight);
  const auto grids = static_cast<int64_t>(shape.grids.size());
  const auto levels = static_cast<int64_t>(shape.dropped.size());
  Tensor distortion = weight.empty({grids, levels}, Dtype::kFloat64);
  Tensor nnz = weight.empty({grids, levels}, Dtype::kInt64);
  Tensor entropy_bits = weight.empty({grids, levels}, Dtype::kFloat64);
  Tensor grid_length = weight.empty({grids, levels}, Dtype::kFloat64);
  Tensor prune_length = weight.empty({grids, levels}, Dtype::kFloat64);
  Tensor norm = weight.empty({grids, levels}, Dtype::kFloat64);
  Tensor threshold = weight.empty({levels}, Dtype::kFloat32);
  Tensor position = weight.empty({levels}, Dtype::kInt64);
  Tensor offset = weight.empty({}, Dtype::kFloat32);
  Tensor clip = weight.empty({shape.bit_grids(), shape.units()}, Dtype::kFloat32);
  Tensor range = weight.empty({shape.units()}, Dtype::kFloat32);
  const DistortionTable table{
      distortion.data<double>(),  nnz.data<int64_t>(),         entropy_bits.data<double>(),
      grid_length.data<double>(), prune_length.data<double>(), norm.data<double>(),
      threshold.data<float>(),    position.data<int64_t>(),    offset.data<float>(),
      clip.data<float>(),         range.data<float>()};

  const Tensor weights = weight.contiguous();
  const std::optional<Tensor> fishers = contiguous(fisher);
  const std::optional<Tensor> importances = contiguous(importance);
  std::string problem;
  dispatch_float(kOp, "weight", weights.dtype(), [&](auto element) {
    using T = decltype(element);
    FITCOMPRESS_DISPATCH(
        weight,
        problem = distortion_table_cpu(shape, weights.data<T>(), data_or_null(fishers),
                                       data_or_null(importances), table),
        problem = distortion_table_cuda(shape, weights.data<T>(), data_or_null(fishers),
                                        data_or_null(importances), table, weight.device_index(),
                                        current_stream(weight), ScratchOn(weight)));
  });
  require(problem.empty(), kOp, ": ", problem);
  return {std::move(distortion),   std::move(nnz),  std::move(entropy_bits), std::move(grid_length),
          std::move(prune_length), std::move(norm), std::move(threshold),    std::move(position),
          std::move(offset),       std::move(clip), std::move(range)};
}

}  // namespace fitcompress
