// Large temporary arrays, their values not set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fitcompress {

struct FreeBuffer {
  void operator()(void* data) const { std::free(data); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeBuffer>;

// Asks for huge pages where they help: touching fresh memory in pages of 4 KiB costs more than all
// the arithmetic of a kernel that goes over it once.
template <class T>
Buffer<T> make_buffer(int64_t count) {
  static_assert(std::is_trivial_v<T>);
  constexpr size_t kCacheLine = 64, kHugePage = size_t{2} << 20;
  const size_t wanted = static_cast<size_t>(count) * sizeof(T);
  const size_t unit = wanted >= kHugePage ? kHugePage : kCacheLine;
  const size_t bytes = (wanted + unit - 1) / unit * unit;
  void* const data = std::aligned_alloc(unit, bytes);
  if (data == nullptr && bytes > 0) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return Buffer<T>(static_cast<T*>(data));
}

}  // namespace fitcompress
