// Every schema and every registration, and nothing else.
#include <exception>
#include <string>

#include "common/isa.h"
#include "torch/adapters.h"

namespace {

using namespace fitcompress;

constexpr const char* kSchemas[] = {
    "square_accumulate_(Tensor(a!)? moment, Tensor(b!)? norms, Tensor output_grad, Tensor input, "
    "int[] kernel, int[] stride, int[] dilation, int groups=1, int images=1, float scale=1.0) -> "
    "()",
    "ghost_norms_(Tensor(a!) norms, Tensor output_grad, Tensor input, int[] kernel, int[] stride, "
    "int[] dilation, int groups=1, int images=1, float scale=1.0) -> ()",
    "winograd_norms_(Tensor(a!) norms, Tensor output_grad, Tensor input, int[] kernel, int[] "
    "stride, int[] dilation, int groups=1, int images=1, float scale=1.0) -> ()",
    "distortion_table(Tensor weight, Tensor? fisher, Tensor? importance, int[] bits, float[] "
    "steps, float[] sparsities, float[] clips, float smoothing, int group, float dead_zone) -> "
    "(Tensor distortion, Tensor nnz, Tensor entropy_bits, Tensor grid_length, Tensor prune_length, "
    "Tensor norm, Tensor threshold, Tensor position, Tensor offset, Tensor clip, Tensor range)",
    "magnitude_histogram(Tensor weight) -> Tensor",
    "fake_quantize_prune(Tensor weight, Tensor scale, Tensor? mask, int max_code, int? "
    "min_code=None, int group=0, bool regrow=False) -> Tensor",
    "fake_quantize_prune_backward(Tensor grad, Tensor weight, Tensor scale, Tensor? mask, int "
    "max_code, int? min_code=None, int group=0, bool regrow=False) -> (Tensor, Tensor)",
    "error_feedback_sweep(Tensor weight, Tensor factor, Tensor scale, Tensor? mask, int max_code, "
    "int beam=1, Tensor? bits=None, float rate=0.0) -> Tensor",
    "input_moments_(Tensor(a!) second, Tensor(b!)? cross, Tensor input, Tensor? output, int[] "
    "kernel, int[] stride, int[] dilation, int[] start, int[] step) -> ()",
};

struct Kernel {
  const char* name;
  void (*function)(StableIValue*, uint64_t, uint64_t);
  bool cpu_only = false;
};

constexpr Kernel kKernels[] = {
    {"square_accumulate_", boxed<square_accumulate_>},
    {"ghost_norms_", boxed<ghost_norms_>},
    {"winograd_norms_", boxed<winograd_norms_>, true},
    {"distortion_table", boxed<distortion_table>},
    {"magnitude_histogram", boxed<magnitude_histogram>},
    {"fake_quantize_prune", boxed<fake_quantize_prune>},
    {"fake_quantize_prune_backward", boxed<fake_quantize_prune_backward>},
    {"error_feedback_sweep", boxed<error_feedback_sweep>},
    {"input_moments_", boxed<input_moments_>, true},
};

constexpr const char* kDevices[] = {
    "CPU",
#ifdef FITCOMPRESS_WITH_CUDA
    "CUDA",
#endif
};

// The libraries are never deleted: that would unregister the ops.
void register_ops() {
  TorchLibraryHandle definitions = nullptr;
  check_torch(aoti_torch_library_init_def("fitcompress", __FILE__, __LINE__, &definitions),
              "the definition of the library fitcompress");
  for (const char* schema : kSchemas) {
    check_torch(aoti_torch_library_def(definitions, schema), schema);
  }
  for (const char* device : kDevices) {
    TorchLibraryHandle kernels = nullptr;
    check_torch(aoti_torch_library_init_impl("fitcompress", device, __FILE__, __LINE__, &kernels),
                "the registration of kernels");
    for (const Kernel& kernel : kKernels) {
      if (kernel.cpu_only && device != kDevices[0]) continue;
      check_torch(torch_library_impl(kernels, kernel.name, kernel.function, kAbiVersion),
                  kernel.name);
    }
  }
}

}  // namespace

#define FITCOMPRESS_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the ops, once; returns null, or what went wrong.
FITCOMPRESS_EXPORT const char* fitcompress_register() {
  static std::string problem;
  static bool done = false;
  if (done) return nullptr;
  try {
    register_ops();
    done = true;
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

FITCOMPRESS_EXPORT int fitcompress_has_cuda() { return sizeof(kDevices) / sizeof(*kDevices) > 1; }

FITCOMPRESS_EXPORT const char* fitcompress_isa() { return name(isa()); }
