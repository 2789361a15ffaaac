#include "distortion/magnitude_histogram.h"

#include "torch/adapters.h"
#include "torch/device.h"

namespace fitcompress {

Tensor magnitude_histogram(const Tensor& weight) {
  const Tensor weights = weight.contiguous();
  Tensor counts = weight.empty({kMagnitudeBins}, Dtype::kInt64);
  dispatch_float("magnitude_histogram", "weight", weights.dtype(), [&](auto element) {
    using T = decltype(element);
    FITCOMPRESS_DISPATCH(
        weight, magnitude_histogram_cpu(weights.data<T>(), weights.numel(), counts.data<int64_t>()),
        magnitude_histogram_cuda(weights.data<T>(), weights.numel(), counts.data<int64_t>(),
                                 weight.device_index(), current_stream(weight)));
  });
  return counts;
}

}  // namespace fitcompress
