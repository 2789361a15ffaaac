// What adapters check and how they choose between the CPU and the CUDA kernel.
#pragma once

#include <memory>
#include <vector>

#include "common/checks.h"
#include "torch/tensor.h"

namespace fitcompress {

inline void require_device(const char* op, const char* what, const Tensor& tensor,
                           const Tensor& first) {
  require(tensor.same_device(first), op, ": ", what,
          " must be on the device of the first argument, got another device");
}

inline void require_sizes(const char* op, const char* what, const Tensor& tensor,
                          const std::vector<int64_t>& wanted) {
  require(tensor.sizes() == wanted, op, ": ", what, " must have shape ", wanted, ", got ",
          tensor.sizes());
}

inline void require_dtype(const char* op, const char* what, const Tensor& tensor, Dtype wanted) {
  require(tensor.dtype() == wanted, op, ": ", what, " must be ", name(wanted), ", got ",
          name(tensor.dtype()));
}

// Calls function(T()) for the C++ type of a floating-point tensor of 16 or 32 bits.
template <class Function>
void dispatch_float(const char* op, const char* what, Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float());
    case Dtype::kFloat16:
      return function(Float16());
    case Dtype::kBFloat16:
      return function(BFloat16());
    default:
      fail(op, ": ", what, " must be float32, bfloat16 or float16, got ", name(dtype));
  }
}

// Scratch memory of torch's allocator on the device of a tensor; lives as long as the last copy.
class ScratchOn {
 public:
  explicit ScratchOn(const Tensor& like)
      : like_(&like), tensors_(std::make_shared<std::vector<Tensor>>()) {}
  void* operator()(int64_t bytes) const {
    tensors_->push_back(like_->empty({bytes}, Dtype::kUInt8));
    return tensors_->back().data();
  }

 private:
  const Tensor* like_;
  std::shared_ptr<std::vector<Tensor>> tensors_;
};

}  // namespace fitcompress

// Within an adapter: the CUDA call if the tensor lives there. Ops are registered for CUDA only in a
// build that has the kernels.
#ifdef FITCOMPRESS_WITH_CUDA
#define FITCOMPRESS_DISPATCH(tensor, cpu_call, cuda_call) \
  do {                                                    \
    if ((tensor).is_cuda()) {                             \
      cuda_call;                                          \
    } else {                                              \
      cpu_call;                                           \
    }                                                     \
  } while (false)
#else
#define FITCOMPRESS_DISPATCH(tensor, cpu_call, cuda_call) cpu_call
#endif
