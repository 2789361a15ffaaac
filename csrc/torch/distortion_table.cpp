#include "distortion/distortion_table.h"

#include <cmath>

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {
namespace {

constexpr const char* kOp = "distortion_table";

DistortionShape check_arguments(const Tensor& weight, const std::optional<Tensor>& fisher,
                                const Tensor& importance, const std::vector<int64_t>& bits,
                                const std::vector<double>& steps,
                                const std::vector<double>& sparsities) {
  require(weight.dim() == 2, kOp, ": weight must be [rows, columns], got ", weight.sizes());
  DistortionShape shape{weight.size(0), weight.size(1), {}, {}};
  require_sizes(kOp, "importance", importance, weight.sizes());
  require_dtype(kOp, "importance", importance, Dtype::kFloat32);
  require_device(kOp, "importance", importance, weight);
  if (fisher) {
    require_sizes(kOp, "fisher", *fisher, weight.sizes());
    require_dtype(kOp, "fisher", *fisher, Dtype::kFloat32);
    require_device(kOp, "fisher", *fisher, weight);
  }
  for (const int64_t b : bits) {
    require(b >= 2 && b <= 16, kOp, ": bits must be between 2 and 16, got ", b);
    shape.grids.push_back({b, 0.0});
  }
  for (const double step : steps) {
    require(std::isfinite(step) && static_cast<float>(step) > 0.0f &&
                std::isfinite(static_cast<float>(step)),
            kOp, ": steps must be positive float32 numbers, got ", step);
    shape.grids.push_back({0, step});
  }
  double previous = 0.0;
  for (const double sparsity : sparsities) {
    require(sparsity >= previous && sparsity < 1.0, kOp,
            ": sparsities must ascend within [0, 1), got ", sparsity, " after ", previous);
    previous = sparsity;
    shape.dropped.push_back(
        static_cast<int64_t>(std::floor(sparsity * static_cast<double>(shape.rows * shape.cols))));
  }
  require(sparsities.size() < 65535, kOp, ": at most 65534 sparsities, got ", sparsities.size());
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distortion_table(
    const Tensor& weight, const std::optional<Tensor>& fisher, const Tensor& importance,
    const std::vector<int64_t>& bits, const std::vector<double>& steps,
    const std::vector<double>& sparsities) {
  const DistortionShape shape =
      check_arguments(weight, fisher, importance, bits, steps, sparsities);
  const std::vector<int64_t> cells = {static_cast<int64_t>(shape.grids.size()),
                                      static_cast<int64_t>(shape.dropped.size())};
  Tensor distortion = weight.empty(cells, Dtype::kFloat64);
  Tensor nnz = weight.empty(cells, Dtype::kInt64);
  Tensor entropy_bits = weight.empty(cells, Dtype::kFloat64);
  Tensor grid_length = weight.empty(cells, Dtype::kFloat64);
  Tensor prune_length = weight.empty(cells, Dtype::kFloat64);
  Tensor norm = weight.empty(cells, Dtype::kFloat64);
  const DistortionTable table{distortion.data<double>(),   nnz.data<int64_t>(),
                              entropy_bits.data<double>(), grid_length.data<double>(),
                              prune_length.data<double>(), norm.data<double>()};

  const Tensor weights = weight.contiguous();
  const Tensor importances = importance.contiguous();
  std::optional<Tensor> fishers;
  if (fisher) fishers.emplace(fisher->contiguous());
  const float* const f = fishers ? fishers->data<float>() : nullptr;
  std::string problem;
  dispatch_float(kOp, "weight", weights.dtype(), [&](auto element) {
    using T = decltype(element);
    FITCOMPRESS_DISPATCH(
        weight,
        problem =
            distortion_table_cpu(shape, weights.data<T>(), f, importances.data<float>(), table),
        const Tensor order = importances.stable_argsort();
        problem = distortion_table_cuda(shape, weights.data<T>(), f, importances.data<float>(),
                                        order.data<int64_t>(), table, weight.device_index(),
                                        current_stream(weight), ScratchOn(weight)));
  });
  require(problem.empty(), kOp, ": ", problem);
  return {std::move(distortion),  std::move(nnz),          std::move(entropy_bits),
          std::move(grid_length), std::move(prune_length), std::move(norm)};
}

}  // namespace fitcompress
