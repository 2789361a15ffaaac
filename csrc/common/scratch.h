// Memory for CUDA kernels, which the caller provides.
#pragma once

#include <cstdint>
#include <functional>

namespace fitcompress {

// Allocates bytes on the kernel's device; freed, in the order of its stream, after the call.
using Scratch = std::function<void*(int64_t bytes)>;

}  // namespace fitcompress
