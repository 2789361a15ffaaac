// Memory that is read at random: in huge pages where Linux has them, or else most reads wait for
// the address before they wait for the value.
#pragma once

#include <cstddef>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fitcompress {

template <class T>
struct HugePages {
  using value_type = T;
  HugePages() = default;
  template <class U>
  HugePages(const HugePages<U>&) {}

  T* allocate(std::size_t count) {
    void* memory = ::operator new(count * sizeof(T), std::align_val_t{align(count)});
#ifdef __linux__
    if (align(count) == kPage) madvise(memory, count * sizeof(T), MADV_HUGEPAGE);  // only a hint
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, std::align_val_t{align(count)});
  }

  friend bool operator==(const HugePages&, const HugePages&) { return true; }
  friend bool operator!=(const HugePages&, const HugePages&) { return false; }

 private:
  static constexpr std::size_t kPage = std::size_t{1} << 21;
  static std::size_t align(std::size_t count) { return count * sizeof(T) < kPage ? 64 : kPage; }
};

}  // namespace fitcompress
