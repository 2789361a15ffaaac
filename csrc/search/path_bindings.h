// The path search in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fitcompress {

void bind_path_search(pybind11::module_& module);

}  // namespace fitcompress
