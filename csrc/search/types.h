// Integers that do not mix: a layer is not a grid, and a cost is not a count.
#pragma once

#include <cstdint>

namespace fitcompress {

template <class Tag>
class Ordinal {
 public:
  constexpr Ordinal() = default;
  constexpr explicit Ordinal(std::int32_t value) : value_(value) {}
  constexpr std::int32_t value() const { return value_; }
  constexpr Ordinal next() const { return Ordinal(value_ + 1); }
  constexpr Ordinal previous() const { return Ordinal(value_ - 1); }
  friend constexpr bool operator==(Ordinal a, Ordinal b) { return a.value_ == b.value_; }
  friend constexpr bool operator!=(Ordinal a, Ordinal b) { return a.value_ != b.value_; }
  friend constexpr bool operator<(Ordinal a, Ordinal b) { return a.value_ < b.value_; }

 private:
  std::int32_t value_ = 0;
};

using Layer = Ordinal<struct LayerTag>;
using Grid = Ordinal<struct GridTag>;          // 0 is the finest
using Sparsity = Ordinal<struct SparsityTag>;  // 0 is the lowest

// Bits, or bit operations: whatever the budget counts. Exact.
class Cost {
 public:
  constexpr Cost() = default;
  constexpr explicit Cost(std::int64_t value) : value_(value) {}
  constexpr std::int64_t value() const { return value_; }
  friend constexpr Cost operator+(Cost a, Cost b) { return Cost(a.value_ + b.value_); }
  friend constexpr Cost operator-(Cost a, Cost b) { return Cost(a.value_ - b.value_); }
  friend constexpr bool operator==(Cost a, Cost b) { return a.value_ == b.value_; }
  friend constexpr bool operator!=(Cost a, Cost b) { return a.value_ != b.value_; }
  friend constexpr bool operator<(Cost a, Cost b) { return a.value_ < b.value_; }
  friend constexpr bool operator<=(Cost a, Cost b) { return a.value_ <= b.value_; }

 private:
  std::int64_t value_ = 0;
};

}  // namespace fitcompress
