// What the adapters of the Fisher ops have in common: checks, and the shape of the weight gradient.
#pragma once

#include <optional>
#include <vector>

#include "fisher/weight_grad.h"
#include "torch/tensor.h"

namespace fitcompress {

// output_grad [N, groups·O, D', H', W'] and input [N, groups·C, D, H, W], float32, bfloat16 or
// float16 alike, any strides; N a multiple of images. Throws std::invalid_argument.
WeightGradShape weight_grad_shape(const char* op, const Tensor& output_grad, const Tensor& input,
                                  const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& dilation, int64_t groups,
                                  int64_t images);

// norms must be float64 [samples] on the device of output_grad.
void require_norms(const char* op, const Tensor& norms, const WeightGradShape& shape,
                   const Tensor& output_grad);

// Both tensors as float32, on the CPU: themselves, or copies that live as long as this.
struct WidenedPair {
  WidenedPair(const WeightGradShape& like, const Tensor& output_grad, const Tensor& input);

  WeightGradShape shape;  // with the strides of the float32 tensors
  std::optional<Tensor> copies[2];
  const float* output_grad;
  const float* input;
};

}  // namespace fitcompress
