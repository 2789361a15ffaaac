// Errors of the native code: std::invalid_argument whose text says what, what was wanted and what
// was got. Python sees a ValueError or RuntimeError with that text.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fitcompress {

// A shape as it is printed: [64, 3, 3, 3].
inline std::ostream& operator<<(std::ostream& out, const std::vector<int64_t>& sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  return out << ']';
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace fitcompress
