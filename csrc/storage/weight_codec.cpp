#include "storage/weight_codec.h"

#include <array>

#include "storage/range_coder.h"

namespace fitcompress {
namespace {

constexpr std::uint8_t kCodec = 1;

struct Bit {
  std::uint16_t p = 1 << 15;
};

template <class Coder>
class Model {
 public:
  explicit Model(Coder* coder) : coder_(coder) {}
  std::int32_t code(std::int32_t x) {
    const bool negative = x < 0;
    const std::uint32_t m = negative ? -static_cast<std::uint32_t>(x) : x;
    std::uint32_t k = 0;
    while (k < 14 && bit(m > k, &magnitude_[k])) ++k;
    if (k == 14) k += escape(m - 14);
    if (k == 0) return 0;
    return coder_->code(negative, 1 << 15) ? -static_cast<std::int32_t>(k)
                                           : static_cast<std::int32_t>(k);
  }

 private:
  bool bit(bool value, Bit* b) {
    const bool v = coder_->code(value, b->p);
    b->p += v ? (65472 - b->p) >> 5 : -((b->p - 64) >> 5);
    return v;
  }
  std::uint32_t escape(std::uint32_t rest) {
    int n = 0;
    while (n < 31 && bit(rest + 1 >= (2u << n), &exponent_[n])) ++n;
    std::uint32_t v = 1;
    for (int i = n - 1; i >= 0; --i) v = v << 1 | coder_->code(((rest + 1) >> i) & 1, 1 << 15);
    return v - 1;
  }
  Coder* coder_;
  std::array<Bit, 14> magnitude_;
  std::array<Bit, 32> exponent_;
};

}  // namespace

std::vector<std::uint8_t> encode_weights(const std::int32_t* codes, std::int64_t rows,
                                         std::int64_t cols) {
  std::vector<std::uint8_t> bytes{kCodec};
  RangeEncoder coder(&bytes);
  Model<RangeEncoder> model(&coder);
  for (std::int64_t i = 0; i < rows * cols; ++i) model.code(codes[i]);
  coder.finish();
  return bytes;
}

void decode_weights(const std::uint8_t* bytes, std::size_t size, std::int64_t rows,
                    std::int64_t cols, std::int32_t* codes) {
  if (size == 0) throw std::invalid_argument("coded weights: got 0 bytes, wanted at least 1");
  RangeDecoder coder(bytes + 1, size - 1);
  Model<RangeDecoder> model(&coder);
  for (std::int64_t i = 0; i < rows * cols; ++i) codes[i] = model.code(0);
  coder.finish();
}

}  // namespace fitcompress
