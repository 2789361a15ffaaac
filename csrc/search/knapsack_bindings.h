#pragma once

#include <pybind11/pybind11.h>

namespace fitcompress {

// Adds `knapsack` and `convex_front` to the module.
void bind_knapsack(pybind11::module_& m);

}  // namespace fitcompress
