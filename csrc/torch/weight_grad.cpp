#include "torch/weight_grad.h"

#include "torch/device.h"

namespace fitcompress {
namespace {

constexpr const char* kPlaces[] = {"depth", "height", "width"};

void require_three(const char* op, const char* what, const std::vector<int64_t>& values) {
  bool ok = values.size() == 3;
  for (const int64_t value : values) ok &= value >= 1;
  require(ok, op, ": ", what, " must be three numbers of at least 1, got ", values);
}

}  // namespace

WeightGradShape weight_grad_shape(const char* op, const Tensor& output_grad, const Tensor& input,
                                  const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& dilation, int64_t groups,
                                  int64_t images) {
  require(output_grad.dim() == 5, op,
          ": output_grad must be [images, outputs, depth, height, width], got ",
          output_grad.sizes());
  require(input.dim() == 5, op, ": input must be [images, channels, depth, height, width], got ",
          input.sizes());
  require_three(op, "kernel", kernel);
  require_three(op, "stride", stride);
  require_three(op, "dilation", dilation);
  require(groups >= 1 && images >= 1, op, ": groups and images must be at least 1, got ", groups,
          " and ", images);
  const Dtype dtype = output_grad.dtype();
  require(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16, op,
          ": output_grad must be float32, bfloat16 or float16, got ", name(dtype));
  require_dtype(op, "input (like output_grad)", input, dtype);
  require_device(op, "input", input, output_grad);
  const std::vector<int64_t> sizes = input.sizes(), grad_sizes = output_grad.sizes();
  require(sizes[0] == grad_sizes[0] && sizes[0] % images == 0, op,
          ": input and output_grad must have the same number of images, a multiple of ", images,
          ", got ", sizes[0], " and ", grad_sizes[0]);
  require(sizes[1] % groups == 0 && grad_sizes[1] % groups == 0, op,
          ": channels and outputs must be multiples of the groups, ", groups, ", got ", sizes[1],
          " and ", grad_sizes[1]);

  WeightGradShape shape{};
  shape.samples = sizes[0] / images;
  shape.images = images;
  shape.groups = groups;
  shape.outputs = grad_sizes[1] / groups;
  shape.channels = sizes[1] / groups;
  const std::vector<int64_t> strides = input.strides(), grad_strides = output_grad.strides();
  for (size_t i = 0; i < 5; ++i) {
    shape.input_strides[i] = strides[i];
    shape.grad_strides[i] = grad_strides[i];
  }
  for (size_t i = 0; i < 3; ++i) {
    const int64_t size = sizes[i + 2], places = grad_sizes[i + 2];
    shape.space[i] = size;
    shape.places[i] = places;
    shape.kernel[i] = kernel[i];
    shape.stride[i] = stride[i];
    shape.dilation[i] = dilation[i];
    if (places == 0) continue;
    // In divided form: nothing overflows, however large the numbers.
    const int64_t last = size - 1;
    const bool fits = last >= 0 && (kernel[i] == 1 || dilation[i] <= last / (kernel[i] - 1)) &&
                      places - 1 <= (last - dilation[i] * (kernel[i] - 1)) / stride[i];
    require(fits, op, ": ", places, " places must fit into the padded input, got size ", size,
            " in the dimension ", kPlaces[i], " for kernel ", kernel[i], ", stride ", stride[i],
            " and dilation ", dilation[i]);
  }
  return shape;
}

void require_norms(const char* op, const Tensor& norms, const WeightGradShape& shape,
                   const Tensor& output_grad) {
  require_dtype(op, "norms", norms, Dtype::kFloat64);
  require_sizes(op, "norms", norms, {shape.samples});
  require_device(op, "norms", norms, output_grad);
}

WidenedPair::WidenedPair(const WeightGradShape& like, const Tensor& grads, const Tensor& inputs)
    : shape(like) {
  const Tensor* tensors[] = {&grads, &inputs};
  std::array<int64_t, 5>* strides[] = {&shape.grad_strides, &shape.input_strides};
  const float** data[] = {&output_grad, &input};
  for (size_t t = 0; t < 2; ++t) {
    if (tensors[t]->dtype() == Dtype::kFloat32) {
      *data[t] = tensors[t]->data<float>();
      continue;
    }
    copies[t].emplace(tensors[t]->contiguous(Dtype::kFloat32));
    *data[t] = copies[t]->data<float>();
    const std::vector<int64_t> found = copies[t]->strides();
    for (size_t i = 0; i < 5; ++i) (*strides[t])[i] = found[i];
  }
}

}  // namespace fitcompress
