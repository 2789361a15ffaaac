// Stands in for libtorch.so when _ops.so is linked, and is never installed: it makes _ops.so ask
// for libtorch.so by name, and, because it exports only the functions that torch 2.10 has, turns
// the use of any other into a link error. Only names count here, not types.
#define EXPORT(name) \
  __attribute__((visibility("default"))) void name() {}

extern "C" {
EXPORT(aoti_torch_copy_)
EXPORT(aoti_torch_delete_library_object)
EXPORT(aoti_torch_delete_tensor_object)
EXPORT(aoti_torch_device_type_cpu)
EXPORT(aoti_torch_device_type_cuda)
EXPORT(aoti_torch_dtype_bfloat16)
EXPORT(aoti_torch_dtype_bool)
EXPORT(aoti_torch_dtype_float16)
EXPORT(aoti_torch_dtype_float32)
EXPORT(aoti_torch_dtype_float64)
EXPORT(aoti_torch_dtype_int32)
EXPORT(aoti_torch_dtype_int64)
EXPORT(aoti_torch_dtype_uint8)
EXPORT(aoti_torch_empty_strided)
EXPORT(aoti_torch_get_data_ptr)
EXPORT(aoti_torch_get_device_index)
EXPORT(aoti_torch_get_device_type)
EXPORT(aoti_torch_get_dim)
EXPORT(aoti_torch_get_dtype)
EXPORT(aoti_torch_get_numel)
EXPORT(aoti_torch_get_sizes)
EXPORT(aoti_torch_get_strides)
EXPORT(aoti_torch_is_contiguous)
EXPORT(aoti_torch_library_def)
EXPORT(aoti_torch_library_init_def)
EXPORT(aoti_torch_library_init_impl)
EXPORT(aoti_torch_new_tensor_handle)
EXPORT(torch_delete_list)
EXPORT(torch_library_impl)
EXPORT(torch_list_get_item)
EXPORT(torch_list_size)
EXPORT(torch_parallel_for)
}
