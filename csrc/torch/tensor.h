// A thin owner of libtorch's tensor handles, and the boxing of an op's arguments and results.
#pragma once

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "torch/stable_abi.h"

namespace fitcompress {

// The oldest libtorch whose boxing rules this file follows, as libtorch encodes its version.
constexpr uint64_t kAbiVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

// Throws std::runtime_error with libtorch's own text if a call of the C ABI failed.
void check_torch(AOTITorchError error, const char* what);

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  // A new contiguous tensor on the device of this one, its values not set.
  Tensor empty(const std::vector<int64_t>& sizes, Dtype dtype) const;
  // This tensor if it is contiguous and of that type, else a copy that is.
  Tensor contiguous(Dtype dtype) const;
  Tensor contiguous() const { return contiguous(dtype()); }
  void copy_(const Tensor& source) const;

  std::vector<int64_t> sizes() const;
  std::vector<int64_t> strides() const;  // in elements
  int64_t size(int64_t dim) const { return sizes()[static_cast<size_t>(dim)]; }
  int64_t dim() const;
  int64_t numel() const;
  Dtype dtype() const;
  bool is_cuda() const;
  int device_index() const;
  bool same_device(const Tensor& other) const;
  void* data() const;
  template <class T>
  T* data() const {
    return static_cast<T*>(data());
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_;
};

// The CUDA stream on which torch runs the work of this tensor's device at present.
void* current_stream(const Tensor& tensor);

// ---- Boxing: libtorch passes every argument as 64 bits, and the callee owns the handles. --------

template <class T>
struct Unbox {  // numbers
  static T take(StableIValue value) {
    static_assert(std::is_arithmetic_v<T>);
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
};

template <>
struct Unbox<Tensor> {
  static Tensor take(StableIValue value) {
    return Tensor(reinterpret_cast<AtenTensorHandle>(value));
  }
};

template <class T>
struct Unbox<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
    if (inner == nullptr) return std::nullopt;
    return Unbox<T>::take(*inner);
  }
};

template <class T>
struct Unbox<std::vector<T>> {
  static std::vector<T> take(StableIValue value) {
    struct Delete {
      void operator()(StableListHandle list) const { torch_delete_list(list); }
    };
    const std::unique_ptr<StableListOpaque, Delete> list(reinterpret_cast<StableListHandle>(value));
    size_t size = 0;
    check_torch(torch_list_size(list.get(), &size), "list size");
    std::vector<T> result(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element = 0;
      check_torch(torch_list_get_item(list.get(), i, &element), "list item");
      result[i] = Unbox<T>::take(element);
    }
    return result;
  }
};

inline void box(StableIValue* stack, Tensor&& result) {
  stack[0] = reinterpret_cast<StableIValue>(result.release());
}

template <class... Results>
void box(StableIValue* stack, std::tuple<Results...>&& results) {
  std::apply([&](auto&... result) { (box(stack++, std::move(result)), ...); }, results);
}

template <auto Function, class Result, class... Args, size_t... I>
void call_boxed(StableIValue* stack, Result (*)(Args...), std::index_sequence<I...>) {
  // Braces: arguments are taken from the stack in their order.
  std::tuple<std::decay_t<Args>...> args{Unbox<std::decay_t<Args>>::take(stack[I])...};
  if constexpr (std::is_void_v<Result>) {
    std::apply(Function, args);
  } else {
    box(stack, std::apply(Function, args));
  }
}

template <class Result, class... Args>
constexpr size_t arity(Result (*)(Args...)) {
  return sizeof...(Args);
}

// The form in which libtorch calls an op: Function's arguments and results on a stack.
template <auto Function>
void boxed(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  call_boxed<Function>(stack, Function, std::make_index_sequence<arity(Function)>());
}

}  // namespace fitcompress
