# _core: searches and entropy coder, plain C++17 under pybind11. Knows numpy arrays, not torch.
# The pip build finds pybind11 as a build requirement; a bare cmake run asks the interpreter for it.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT pybind11_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 2.13 CONFIG REQUIRED)

pybind11_add_module(_core MODULE
  csrc/core.cpp
  csrc/search/branch_and_bound.cpp
  csrc/search/convex_front.cpp
  csrc/search/knapsack.cpp
  csrc/search/knapsack_bindings.cpp
  csrc/search/level_lists.cpp
  csrc/search/mixture.cpp
  csrc/search/multipliers.cpp
  csrc/search/path_beam.cpp
  csrc/search/path_best_first.cpp
  csrc/search/path_bindings.cpp
  csrc/search/path_cells.cpp
  csrc/search/path_greedy.cpp
  csrc/search/path_metric.cpp
  csrc/search/path_moves.cpp
  csrc/search/path_search.cpp
  csrc/search/path_tables.cpp
  csrc/search/plan_repair.cpp
  csrc/search/remaining_layers.cpp
  csrc/search/single_budget.cpp
  csrc/storage/adaptive_codec.cpp
  csrc/storage/codec_bindings.cpp
  csrc/storage/sequence_dictionary.cpp
  csrc/storage/static_decoder.cpp
  csrc/storage/static_encoder.cpp
  csrc/storage/static_layout.cpp
  csrc/storage/symbol_shares.cpp
  csrc/storage/weight_codec.cpp)
# The same plan on every machine: no fused multiply-add where the source has two roundings.
file(GLOB search_sources RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} csrc/search/*.cpp)
set_source_files_properties(${search_sources} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
find_package(Threads REQUIRED)
target_link_libraries(_core PRIVATE fitcompress_options Threads::Threads)
install(TARGETS _core LIBRARY DESTINATION fitcompress)
