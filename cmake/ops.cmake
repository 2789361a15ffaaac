# _ops.so: every tensor op, registered with torch through its stable C ABI. Torch is not needed to
# build it: it is linked against a stub that carries libtorch's name and the allowed functions.

add_library(fitcompress_torch_stub SHARED csrc/torch/stub.cpp)
set_target_properties(fitcompress_torch_stub PROPERTIES OUTPUT_NAME torch
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)

add_library(fitcompress_ops MODULE
  csrc/common/isa.cpp
  csrc/compensate/beam_sweep.cpp
  csrc/compensate/error_feedback_sweep.cpp
  csrc/compensate/input_moments.cpp
  csrc/distortion/cells.cpp
  csrc/distortion/clipping.cpp
  csrc/distortion/distortion_table.cpp
  csrc/distortion/inspection.cpp
  csrc/distortion/magnitude_histogram.cpp
  csrc/distortion/slots.cpp
  csrc/distortion/thresholds.cpp
  csrc/fisher/ghost_norms.cpp
  csrc/fisher/ghost_plan.cpp
  csrc/fisher/square_accumulate.cpp
  csrc/fisher/winograd_norms.cpp
  csrc/quantize/fake_quantize_prune.cpp
  csrc/torch/distortion_table.cpp
  csrc/torch/error_feedback_sweep.cpp
  csrc/torch/fake_quantize_prune.cpp
  csrc/torch/ghost_norms.cpp
  csrc/torch/input_moments.cpp
  csrc/torch/magnitude_histogram.cpp
  csrc/torch/ops.cpp
  csrc/torch/parallel.cpp
  csrc/torch/square_accumulate.cpp
  csrc/torch/tensor.cpp
  csrc/torch/weight_grad.cpp
  csrc/torch/winograd_norms.cpp)
set_target_properties(fitcompress_ops PROPERTIES
  OUTPUT_NAME _ops PREFIX "" SUFFIX ".so" BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "")
# No fused multiply-add unless a file asks for it: results are to have the same bits on every
# instruction set.
target_compile_options(fitcompress_ops PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
set_source_files_properties(csrc/compensate/input_moments.cpp csrc/fisher/ghost_norms.cpp
  csrc/fisher/square_accumulate.cpp csrc/fisher/winograd_norms.cpp
  PROPERTIES COMPILE_OPTIONS -ffp-contract=fast)
# The stub must become a dependency although libtorch is loaded already, and nothing that it lacks
# may stay undefined.
target_link_options(fitcompress_ops PRIVATE -Wl,--no-as-needed -Wl,-z,defs -Wl,--exclude-libs,ALL)
target_link_libraries(fitcompress_ops PRIVATE fitcompress_options fitcompress_torch_stub)

# CUDA kernels, in the same file, which loads without CUDA too: the run-time library is linked
# statically, and the one function of torch's that they need is weak.
if(NOT FITCOMPRESS_CUDA STREQUAL "OFF")
  find_program(FITCOMPRESS_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
  if(FITCOMPRESS_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} ${FITCOMPRESS_NVCC})
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER AND FITCOMPRESS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FITCOMPRESS_CUDA is ON, but there is no working nvcc; put it on the PATH "
      "or set CUDACXX")
  endif()
endif()
if(CMAKE_CUDA_COMPILER)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE FITCOMPRESS_NVCC_TEXT)
    string(REGEX MATCH "release ([0-9.]+)" _ "${FITCOMPRESS_NVCC_TEXT}")
    if(CMAKE_MATCH_1 VERSION_LESS 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # the newest as PTX too, for later ones
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
    endif()
  endif()
  enable_language(CUDA)
  set(CUDA_EXACT
    csrc/compensate/beam_sweep.cu
    csrc/compensate/error_feedback_sweep.cu
    csrc/distortion/clipping.cu
    csrc/distortion/inspection.cu
    csrc/distortion/magnitude_histogram.cu
    csrc/distortion/slots.cu
    csrc/distortion/thresholds.cu
    csrc/quantize/fake_quantize_prune.cu)
  set_source_files_properties(${CUDA_EXACT} PROPERTIES COMPILE_OPTIONS -fmad=false)
  target_sources(fitcompress_ops PRIVATE ${CUDA_EXACT}
    csrc/distortion/device_table.cpp
    csrc/fisher/ghost_norms.cu
    csrc/fisher/operand.cu
    csrc/fisher/partial_sums.cu
    csrc/fisher/single_position.cu
    csrc/fisher/square_accumulate.cu
    csrc/fisher/square_few.cu)
  target_compile_definitions(fitcompress_ops PRIVATE FITCOMPRESS_WITH_CUDA)
  target_compile_options(fitcompress_ops PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror>)
  set_target_properties(fitcompress_ops PROPERTIES
    CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
    CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
else()
  message(STATUS "fitcompress: no CUDA kernels (FITCOMPRESS_CUDA=${FITCOMPRESS_CUDA})")
endif()
install(TARGETS fitcompress_ops LIBRARY DESTINATION fitcompress)
