#include "torch/tensor.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/checks.h"

namespace fitcompress {
namespace {

int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return aoti_torch_dtype_float32();
    case Dtype::kFloat64:
      return aoti_torch_dtype_float64();
    case Dtype::kFloat16:
      return aoti_torch_dtype_float16();
    case Dtype::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::kInt32:
      return aoti_torch_dtype_int32();
    case Dtype::kInt64:
      return aoti_torch_dtype_int64();
    case Dtype::kUInt8:
      return aoti_torch_dtype_uint8();
    case Dtype::kBool:
      return aoti_torch_dtype_bool();
    case Dtype::kOther:
      break;
  }
  throw std::invalid_argument("no torch dtype for this tensor");
}

// Reads one property of a tensor.
template <class T, class Getter>
T property(Getter getter, AtenTensorHandle handle, const char* what) {
  T result{};
  check_torch(getter(handle, &result), what);
  return result;
}

}  // namespace

void check_torch(AOTITorchError error, const char* what) {
  if (error == 0) return;
  std::string text = std::string("torch failed at ") + what;
  if (torch_exception_get_what_without_backtrace != nullptr) {
    text += std::string(": ") + torch_exception_get_what_without_backtrace();
  }
  throw std::runtime_error(text);
}

Tensor Tensor::empty(const std::vector<int64_t>& sizes, Dtype dtype) const {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle result = nullptr;
  check_torch(
      aoti_torch_empty_strided(
          static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch_dtype(dtype),
          property<int32_t>(aoti_torch_get_device_type, handle_, "device type"), device_index(),
          &result),
      "allocation");
  return Tensor(result);
}

Tensor Tensor::contiguous(Dtype wanted) const {
  if (dtype() == wanted && property<bool>(aoti_torch_is_contiguous, handle_, "is_contiguous")) {
    AtenTensorHandle alias = nullptr;
    check_torch(aoti_torch_new_tensor_handle(handle_, &alias), "new handle");
    return Tensor(alias);
  }
  Tensor copy = empty(sizes(), wanted);
  copy.copy_(*this);
  return copy;
}

void Tensor::copy_(const Tensor& source) const {
  check_torch(aoti_torch_copy_(handle_, source.get(), 0), "copy");
}

std::vector<int64_t> Tensor::sizes() const {
  const auto* sizes = property<int64_t*>(aoti_torch_get_sizes, handle_, "sizes");
  return {sizes, sizes + dim()};
}

std::vector<int64_t> Tensor::strides() const {
  const auto* strides = property<int64_t*>(aoti_torch_get_strides, handle_, "strides");
  return {strides, strides + dim()};
}

int64_t Tensor::dim() const { return property<int64_t>(aoti_torch_get_dim, handle_, "dim"); }

int64_t Tensor::numel() const { return property<int64_t>(aoti_torch_get_numel, handle_, "numel"); }

Dtype Tensor::dtype() const {
  const auto code = property<int32_t>(aoti_torch_get_dtype, handle_, "dtype");
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16,
                            Dtype::kInt32, Dtype::kInt64, Dtype::kUInt8, Dtype::kBool}) {
    if (torch_dtype(dtype) == code) return dtype;
  }
  return Dtype::kOther;
}

bool Tensor::is_cuda() const {
  return property<int32_t>(aoti_torch_get_device_type, handle_, "device type") ==
         aoti_torch_device_type_cuda();
}

int Tensor::device_index() const {
  return property<int32_t>(aoti_torch_get_device_index, handle_, "device index");
}

bool Tensor::same_device(const Tensor& other) const {
  const auto type = [](const Tensor& tensor) {
    return property<int32_t>(aoti_torch_get_device_type, tensor.get(), "device type");
  };
  return type(*this) == type(other) && (!is_cuda() || device_index() == other.device_index());
}

void* Tensor::data() const {
  return property<void*>(aoti_torch_get_data_ptr, handle_, "data pointer");
}

void* current_stream(const Tensor& tensor) {
  require(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream(tensor.device_index(), &stream), "CUDA stream");
  return stream;
}

}  // namespace fitcompress
