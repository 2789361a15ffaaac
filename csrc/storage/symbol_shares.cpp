#include "storage/symbol_shares.h"

#include <array>
#include <cmath>
#include <stdexcept>

#include "storage/adaptive_bit.h"
#include "storage/range_coder.h"

namespace fitcompress {
namespace {

constexpr int kSymbols = 255;
constexpr std::int64_t kLargestRoot = 1 << 16;

std::uint32_t rounded_root(std::uint64_t n) {
  auto root = static_cast<std::uint64_t>(std::sqrt(static_cast<double>(n)));
  while (root * root > n) --root;
  while ((root + 1) * (root + 1) <= n) ++root;
  return static_cast<std::uint32_t>(n > root * (root + 1) ? root + 1 : root);
}

// The questions about one kind of number.
struct Numbers {
  AdaptiveBit zero = AdaptiveBit::start(1 << 15);
  AdaptiveBit negative = AdaptiveBit::start(1 << 15);
  std::array<AdaptiveBit, 18> digit = [] {
    std::array<AdaptiveBit, 18> result{};
    result.fill(AdaptiveBit::start(1 << 15));
    return result;
  }();
};

template <class Coder>
class ShareModel {
 public:
  ShareModel(Coder* coder, bool symmetric) : coder_(coder), symmetric_(symmetric) {}

  // Codes the roots of all symbols up to the last that occurs, 0 where one does not.
  void code(std::vector<std::int64_t>* roots) {
    std::uint32_t last = 0;
    for (int i = 7; i >= 0; --i) {
      const bool digit = (roots->size() - 1) >> i & 1;
      last = last << 1 | (coder_->code(digit, 1 << 15) ? 1u : 0u);
    }
    if (last >= kSymbols) throw std::invalid_argument("coded weights: too many symbols");
    roots->resize(last + 1, 0);
    for (std::uint32_t i = 0; i <= last; ++i) {
      std::int64_t& root = (*roots)[i];
      const std::int64_t expected = expectation(*roots, i);
      if (symmetric_ && i > 0 && i % 2 == 0) {
        root = expected;
        continue;
      }
      root = expected + difference(root - expected, &numbers_[kind_of(i, expected)]);
      if (root < 0 || root > kLargestRoot) {
        throw std::invalid_argument("coded weights: an impossible share");
      }
    }
    if (roots->back() == 0 || (symmetric_ && last % 2 == 1))
      throw std::invalid_argument("coded weights: the last share is impossible");
  }

 private:
  static std::int64_t expectation(const std::vector<std::int64_t>& roots, std::uint32_t i) {
    if (i == 0) return 0;
    if (i % 2 == 0 || i == 1) return roots[i - 1];
    return (roots[i - 1] + roots[i - 2]) / 2;
  }

  static std::size_t kind_of(std::uint32_t i, std::int64_t expected) {
    const std::size_t known = expected == 0 ? 0 : expected < 4 ? 1 : 2;
    return i == 0 ? 0 : 1 + 3 * (i % 2) + known;
  }

  std::int64_t difference(std::int64_t value, Numbers* numbers) {
    if (bit(value == 0, &numbers->zero)) return 0;
    const bool negative = bit(value < 0, &numbers->negative);
    const auto rest = static_cast<std::uint64_t>(negative ? -value : value);  // from 1 on
    int digits = 0;
    while (digits < 17 && bit(rest >> (digits + 1) != 0, &numbers->digit[digits])) ++digits;
    std::int64_t magnitude = 1;
    for (int i = digits - 1; i >= 0; --i) {
      magnitude = magnitude << 1 | (coder_->code(rest >> i & 1, 1 << 15) ? 1 : 0);
    }
    return negative ? -magnitude : magnitude;
  }

  bool bit(bool value, AdaptiveBit* b) {
    return code_adaptive(coder_, value, b, learning_rates().data());
  }

  Coder* coder_;
  bool symmetric_;
  std::array<Numbers, 7>
      numbers_;  // of the symbol 0; of negative and positive ones, by what to expect
};

// The shares of those that occur; roots of all in order.
template <class Roots>
SymbolShares present(const Roots& roots) {
  SymbolShares shares;
  for (std::size_t i = 0; i < roots.size(); ++i) {
    if (roots[i] == 0) continue;
    const auto half = static_cast<int>((i + 1) / 2);
    shares.symbols.push_back(static_cast<std::int8_t>(i % 2 == 1 ? half : -half));
    shares.roots.push_back(static_cast<std::uint32_t>(roots[i]));
  }
  return shares;
}

}  // namespace

SymbolShares shares_of(const std::vector<std::uint64_t>& counts, bool symmetric) {
  std::vector<std::uint32_t> roots;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    std::uint64_t count = counts[i];
    if (symmetric && i > 0) {
      const std::uint64_t both = count + counts[i % 2 == 1 ? i + 1 : i - 1];
      count = (both + 1) / 2;
    }
    roots.push_back(rounded_root(count));
  }
  return present(roots);
}

std::vector<std::uint8_t> encode_shares(const SymbolShares& shares, bool symmetric) {
  std::vector<std::int64_t> roots(order_of(shares.symbols.back()) + 1);
  for (std::size_t i = 0; i < shares.symbols.size(); ++i) {
    roots[order_of(shares.symbols[i])] = shares.roots[i];
  }
  std::vector<std::uint8_t> bytes;
  RangeEncoder coder(&bytes);
  ShareModel<RangeEncoder>(&coder, symmetric).code(&roots);
  coder.finish();
  return bytes;
}

SymbolShares decode_shares(const std::uint8_t* bytes, std::size_t size, bool symmetric) {
  RangeDecoder coder(bytes, size);
  std::vector<std::int64_t> roots(1);
  ShareModel<RangeDecoder>(&coder, symmetric).code(&roots);
  coder.finish();
  return present(roots);
}

}  // namespace fitcompress
