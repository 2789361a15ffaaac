#include "compensate/input_moments.h"

#include <array>

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {
namespace {

constexpr const char* kOp = "input_moments_";
constexpr const char* kPlaces[] = {"depth", "height", "width"};

// The places of a convolution's output in one dimension that are taken.
struct Places {
  int64_t size;   // all
  int64_t count;  // taken
};

void require_three(const char* what, const std::vector<int64_t>& values, int64_t least) {
  bool ok = values.size() == 3;
  for (const int64_t value : values) ok &= value >= least;
  require(ok, kOp, ": ", what, " must be three numbers of at least ", least, ", got ", values);
}

Places places_of(int dim, int64_t size, int64_t kernel, int64_t stride, int64_t dilation,
                 int64_t start, int64_t step) {
  // In divided form: nothing overflows, however large the numbers.
  require(size > 0 && (kernel == 1 || dilation <= (size - 1) / (kernel - 1)), kOp,
          ": the kernel must fit into the input, got size ", size, " in the dimension ",
          kPlaces[dim], " for kernel ", kernel, " with dilation ", dilation);
  const int64_t all = (size - 1 - dilation * (kernel - 1)) / stride + 1;
  return {all, start < all ? (all - 1 - start) / step + 1 : 0};
}

}  // namespace

void input_moments_(const Tensor& second, const std::optional<Tensor>& cross, const Tensor& input,
                    const std::optional<Tensor>& output, const std::vector<int64_t>& kernel,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                    const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  require(second.dim() == 3 && second.size(0) > 0, kOp,
          ": second must be [groups, inputs + 1, inputs + 1] with at least one group, got ",
          second.sizes());
  require(input.dim() == 5, kOp, ": input must be [samples, channels, depth, height, width], got ",
          input.sizes());
  require_three("kernel", kernel, 1);
  require_three("stride", stride, 1);
  require_three("dilation", dilation, 1);
  require_three("start", start, 0);
  require_three("step", step, 1);
  const std::vector<int64_t> sizes = input.sizes(), strides = input.strides();
  const int64_t groups = second.size(0), samples = sizes[0], channels = sizes[1] / groups;
  require(sizes[1] % groups == 0, kOp, ": the channels of input must be a multiple of the groups, ",
          groups, ", got ", sizes[1]);

  StridedMatrix in{};
  in.group_stride = channels * strides[1];
  in.feature_sizes[0] = channels;
  in.feature_strides[0] = strides[1];
  in.position_sizes[0] = samples;
  in.position_strides[0] = strides[0];
  std::vector<int64_t> output_sizes{samples, 0};
  int64_t inputs = channels, offset = 0, positions = samples;
  for (int i = 0; i < 3; ++i) {
    const auto at = static_cast<size_t>(i);
    const Places places =
        places_of(i, sizes[at + 2], kernel[at], stride[at], dilation[at], start[at], step[at]);
    output_sizes.push_back(places.size);
    positions *= places.count;
    inputs *= kernel[at];
    in.feature_sizes[at + 1] = kernel[at];
    in.position_sizes[at + 1] = places.count;
    if (places.count > 0) offset += start[at] * stride[at] * strides[at + 2];
    if (kernel[at] > 1) in.feature_strides[at + 1] = dilation[at] * strides[at + 2];
    if (places.count > 1) in.position_strides[at + 1] = step[at] * stride[at] * strides[at + 2];
  }
  require_dtype(kOp, "second", second, Dtype::kFloat64);
  require_sizes(kOp, "second", second, {groups, inputs + 1, inputs + 1});
  require_dtype(kOp, "input", input, Dtype::kFloat32);
  require_device(kOp, "input", input, second);
  require(cross.has_value() == output.has_value(), kOp,
          ": cross and output must be given together, got only ", cross ? "cross" : "output");
  StridedMatrix out{};
  if (cross) {
    require(cross->dim() == 3, kOp, ": cross must be [groups, outputs, inputs + 1], got ",
            cross->sizes());
    const int64_t outputs = cross->size(1);
    require_dtype(kOp, "cross", *cross, Dtype::kFloat64);
    require_sizes(kOp, "cross", *cross, {groups, outputs, inputs + 1});
    require_device(kOp, "cross", *cross, second);
    require_dtype(kOp, "output", *output, Dtype::kFloat32);
    output_sizes[1] = groups * outputs;
    require_sizes(kOp, "output", *output, output_sizes);
    require_device(kOp, "output", *output, second);
    const std::vector<int64_t> from = output->strides();
    out.group_stride = outputs * from[1];
    out.feature_sizes = {outputs, 1, 1, 1};
    out.feature_strides = {from[1], 0, 0, 0};
    out.position_sizes = in.position_sizes;
    out.position_strides[0] = from[0];
    out.data = output->data<float>();
    for (size_t i = 0; i < 3; ++i) {
      if (in.position_sizes[i + 1] > 0) out.data += start[i] * from[i + 2];
      if (in.position_sizes[i + 1] > 1) out.position_strides[i + 1] = step[i] * from[i + 2];
    }
  }
  if (positions == 0) return;

  in.data = input.data<float>() + offset;
  const Tensor sums = second.contiguous();  // second itself, if it is contiguous
  std::optional<Tensor> cross_sums;
  if (cross) cross_sums.emplace(cross->contiguous());
  input_moments_cpu(groups, in, cross ? &out : nullptr, sums.data<double>(),
                    cross ? cross_sums->data<double>() : nullptr);
  if (sums.data() != second.data()) second.copy_(sums);
  if (cross && cross_sums->data() != cross->data()) cross->copy_(*cross_sums);
}

}  // namespace fitcompress
