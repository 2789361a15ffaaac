// The coder of weights in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fitcompress {

void bind_codec(pybind11::module_& module);

}  // namespace fitcompress
