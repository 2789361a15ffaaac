// Fuzz target of the decoder of weights: any bytes are refused or mean one matrix.
//
// The first eight bytes say rows, columns, largest code, threads and kind of scales, the others
// are the stream. Codes and values must be refused both or agree; what was accepted must survive
// another round trip; and no decoder may take much more memory than its result.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "storage/weight_codec.h"

// Of sanitizer/allocator_interface.h, which gcc does not install.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             std::size_t),
                                                         void (*free_hook)(const volatile void*));
extern "C" std::size_t __sanitizer_get_allocated_size(const volatile void* p);

namespace {

constexpr std::size_t kHeader = 8;
constexpr std::int64_t kMostWeights = std::int64_t{1} << 19;
constexpr std::int64_t kMostToEncode = std::int64_t{1} << 13;
// Tables, and what a block of 2^18 weights takes for a thread.
constexpr std::int64_t kConstantBytes = std::int64_t{3} << 20;
constexpr std::int64_t kBlockBytes = std::int64_t{3} << 19;

std::atomic<std::int64_t> held{0};
std::atomic<std::int64_t> peak{0};

void on_malloc(const volatile void* p, std::size_t size) {
  static_cast<void>(p);
  const std::int64_t now = held += static_cast<std::int64_t>(size);
  if (now > peak) peak = now;
}

void on_free(const volatile void* p) {
  held -= static_cast<std::int64_t>(__sanitizer_get_allocated_size(p));
}

[[noreturn]] void finding(const char* what) {
  std::fprintf(stderr, "FINDING: %s\n", what);
  std::abort();
}

struct Input {
  std::int64_t rows, cols;
  std::int32_t largest;
  int threads;
  std::vector<float> scales;
  std::vector<std::uint8_t> stream;
};

Input parsed(const std::uint8_t* data, std::size_t size) {
  Input in;
  in.rows = data[0] | data[1] << 8;
  in.cols = data[2] | data[3] << 8 | (data[7] & 15) << 16;
  in.rows = std::min(in.rows, kMostWeights);
  in.cols = std::min(in.cols, kMostWeights / std::max<std::int64_t>(in.rows, 1));
  in.largest = static_cast<std::int32_t>((std::int64_t{1} << (data[4] % 31)) - (data[4] >= 31));
  in.threads = 1 + (data[5] & 3);
  const bool per_row = (data[6] & 1) != 0;
  for (std::int64_t r = 0; r < (per_row ? in.rows : 1); ++r) {
    in.scales.push_back(0.125f * static_cast<float>(1 + (data[6] + r) % 7));
  }
  in.stream.assign(data + kHeader, data + size);
  return in;
}

// Whether a decoder accepts the stream; anything but a typed refusal gets through to the sanitizer.
template <class Decode>
bool accepted(const Input& in, const Decode& decode) {
  const std::int64_t before = held;
  peak = before;
  bool result = true;
  try {
    decode();
  } catch (const std::invalid_argument&) {
    result = false;
  }
  const std::int64_t most = 4 * in.rows * in.cols + kConstantBytes + kBlockBytes * in.threads +
                            16 * static_cast<std::int64_t>(in.stream.size());
  if (peak - before > most) finding("more memory than twice the matrix");
  return result;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fitcompress;
  static const int hooked = __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
  static_cast<void>(hooked);
  if (size < kHeader) return -1;
  const Input in = parsed(data, size);
  const auto* stream = in.stream.data();
  const std::size_t bytes = in.stream.size();
  const auto count = static_cast<std::size_t>(in.rows * in.cols);
  try {
    check_stream(stream, bytes, in.rows, in.cols);
  } catch (const std::invalid_argument&) {
    return 0;
  }
  std::vector<std::int32_t> codes(count);
  std::vector<float> values(count);
  const bool as_codes = accepted(in, [&] {
    decode_weights(stream, bytes, in.rows, in.cols, in.largest, in.threads, codes.data());
  });
  const bool as_values = accepted(in, [&] {
    decode_values(stream, bytes, in.rows, in.cols, in.largest, 1, in.scales.data(),
                  in.scales.size() > 1, values.data());
  });
  if (as_codes != as_values) finding("codes and values are not refused alike");
  if (!as_codes) return 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (std::abs(codes[i]) > in.largest) finding("a code beyond the largest");
    const std::size_t row = i / static_cast<std::size_t>(in.cols);
    const float wanted = static_cast<float>(codes[i]) * in.scales[in.scales.size() > 1 ? row : 0];
    if (std::memcmp(&wanted, &values[i], sizeof wanted) != 0) {
      finding("codes and values differ");
    }
  }
  if (in.rows * in.cols <= kMostToEncode) {
    const Coding coding = stream[0] == 1 ? Coding::kAdaptive : Coding::kStatic;
    const auto again = encode_weights(codes.data(), in.rows, in.cols, coding, in.threads);
    std::vector<std::int32_t> decoded(count);
    decode_weights(again.data(), again.size(), in.rows, in.cols, in.largest, 1, decoded.data());
    if (decoded != codes) finding("another round trip changes the codes");
  }
  return 1;  // gcc's driver counts these; libFuzzer wants 0 or -1, see README.md
}
