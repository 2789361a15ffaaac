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

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages: touching fresh memory in pages of 4 KiB costs more than all the arithmetic
// of a kernel that goes over it once. Memory of which pages are in use already is left as it is.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const auto first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
Buffer<T> make_buffer(int64_t count) {
  static_assert(std::is_trivial_v<T>);
  constexpr size_t kCacheLine = 64;
  const size_t wanted = static_cast<size_t>(count) * sizeof(T);
  const size_t unit = wanted >= kHugePage ? kHugePage : kCacheLine;
  const size_t bytes = (wanted + unit - 1) / unit * unit;
  void* const data = std::aligned_alloc(unit, bytes);
  if (data == nullptr && bytes > 0) throw std::bad_alloc();
  advise_huge_pages(data, bytes);
  return Buffer<T>(static_cast<T*>(data));
}

}  // namespace fitcompress
