// One piece of memory for the tables of one pass after the other.
#pragma once

#include <cstdint>

#include "common/buffer.h"

namespace fitcompress {

// Separate allocations would leave holes that the next, larger one cannot use.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(make_buffer<double>(doubles(bytes))) {}

  // Room for `count` values, not set; what was there before is lost.
  template <class V>
  V* take(int64_t count) {
    const int64_t wanted = count * static_cast<int64_t>(sizeof(V));
    if (wanted > bytes_) {
      data_.reset();
      data_ = make_buffer<double>(doubles(wanted));
      bytes_ = wanted;
    }
    return reinterpret_cast<V*>(data_.get());
  }

 private:
  static int64_t doubles(int64_t bytes) { return (bytes + 7) / 8; }

  int64_t bytes_;
  Buffer<double> data_;
};

}  // namespace fitcompress
