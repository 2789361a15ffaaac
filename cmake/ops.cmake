# _ops.so: every tensor op, registered with torch through its stable C ABI. Torch is not needed to
# build it: it is linked against a stub that carries libtorch's name and the allowed functions.

add_library(fitcompress_torch_stub SHARED csrc/torch/stub.cpp)
set_target_properties(fitcompress_torch_stub PROPERTIES OUTPUT_NAME torch
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)

add_library(fitcompress_ops MODULE
  csrc/common/isa.cpp
  csrc/compensate/error_feedback_sweep.cpp
  csrc/distortion/distortion_table.cpp
  csrc/distortion/partition.cpp
  csrc/fisher/square_accumulate.cpp
  csrc/quantize/fake_quantize_prune.cpp
  csrc/torch/distortion_table.cpp
  csrc/torch/error_feedback_sweep.cpp
  csrc/torch/fake_quantize_prune.cpp
  csrc/torch/ops.cpp
  csrc/torch/parallel.cpp
  csrc/torch/square_accumulate.cpp
  csrc/torch/tensor.cpp)
set_target_properties(fitcompress_ops PROPERTIES
  OUTPUT_NAME _ops PREFIX "" SUFFIX ".so" BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "")
# No fused multiply-add unless a file asks for it: results are to have the same bits on every
# instruction set.
target_compile_options(fitcompress_ops PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
set_source_files_properties(csrc/fisher/square_accumulate.cpp PROPERTIES
  COMPILE_OPTIONS -ffp-contract=fast)
# The stub must become a dependency although libtorch is loaded already, and nothing that it lacks
# may stay undefined.
target_link_options(fitcompress_ops PRIVATE -Wl,--no-as-needed -Wl,-z,defs -Wl,--exclude-libs,ALL)
target_link_libraries(fitcompress_ops PRIVATE fitcompress_options fitcompress_torch_stub)
install(TARGETS fitcompress_ops LIBRARY DESTINATION fitcompress)
