// The ops as C++ functions of tensors. Each checks its arguments, allocates its results and calls
// the kernel of the tensors' device. The schemas in ops.cpp say what the arguments are.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "torch/tensor.h"

namespace fitcompress {

void square_accumulate_(const std::optional<Tensor>& moment, const std::optional<Tensor>& norms,
                        const Tensor& output_grad, const Tensor& input,
                        const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                        double scale);

void ghost_norms_(const Tensor& norms, const Tensor& output_grad, const Tensor& input,
                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                  double scale);

void winograd_norms_(const Tensor& norms, const Tensor& output_grad, const Tensor& input,
                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& dilation, int64_t groups, int64_t images,
                     double scale);

// The fields of DistortionTable, in their order.
using DistortionTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                     Tensor, Tensor, Tensor>;

DistortionTensors distortion_table(const Tensor& weight, const std::optional<Tensor>& fisher,
                                   const std::optional<Tensor>& importance,
                                   const std::vector<int64_t>& bits,
                                   const std::vector<double>& steps,
                                   const std::vector<double>& sparsities,
                                   const std::vector<double>& clips, double smoothing,
                                   int64_t group, double dead_zone);

Tensor magnitude_histogram(const Tensor& weight);

Tensor fake_quantize_prune(const Tensor& weight, const Tensor& scale,
                           const std::optional<Tensor>& mask, int64_t max_code,
                           std::optional<int64_t> min_code, int64_t group, bool regrow);

std::tuple<Tensor, Tensor> fake_quantize_prune_backward(const Tensor& grad, const Tensor& weight,
                                                        const Tensor& scale,
                                                        const std::optional<Tensor>& mask,
                                                        int64_t max_code,
                                                        std::optional<int64_t> min_code,
                                                        int64_t group, bool regrow);

Tensor error_feedback_sweep(const Tensor& weight, const Tensor& factor, const Tensor& scale,
                            const std::optional<Tensor>& mask, int64_t max_code, int64_t beam,
                            const std::optional<Tensor>& bits, double rate);

void input_moments_(const Tensor& second, const std::optional<Tensor>& cross, const Tensor& input,
                    const std::optional<Tensor>& output, const std::vector<int64_t>& kernel,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                    const std::vector<int64_t>& start, const std::vector<int64_t>& step);

}  // namespace fitcompress
