// The functions of libtorch's stable C ABI that this library uses, all of them present since
// torch 2.10 unless marked weak. Declared here so that building needs no torch; tests/test_shim.py
// compiles this file together with the headers of the installed torch, so that a declaration that
// differs is a compile error. A new function is added here and in stub.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;

using AOTITorchError = int32_t;  // 0 is success
using StableIValue = uint64_t;   // one argument or result: a number, a handle, or a pointer to one
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* context);

// Enumerators, whose values are not part of the ABI.
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_uint8();

// Tensors. Sizes, strides and data pointers are borrowed from the tensor.
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle source,
                                int32_t non_blocking);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* result);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** result);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** result);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** result);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* result);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* result);

// Lists of numbers, one StableIValue an element.
AOTITorchError torch_delete_list(StableListHandle list);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* result);
AOTITorchError torch_list_size(StableListHandle list, size_t* result);

// Operators, defined.
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
AOTITorchError aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line,
                                           TorchLibraryHandle* result);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file,
                                            uint32_t line, TorchLibraryHandle* result);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*function)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t abi_version);

// Torch's thread pool. The function must not throw.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  ParallelFunc function, void* context);

// Weak: absent from a torch without CUDA, and from torch before 2.13.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                        void** result);
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

}  // extern "C"
