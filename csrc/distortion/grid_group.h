// Grids whose codes are monotone functions of one number x ≥ 0, the same in every scale unit.
//
// x is |w|/range for fixed-point grids and |w| for grids with a step. All codes together change at
// certain x only, which cut the numbers into cells; K = Σ_g code_g(x) grows from one cell to the
// next, so it is the index of a cell, and costs a handful of vector instructions a grid. `spacing`
// is the distance of two codes in units of x; θ̂ = code · spacing · (range or 1).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/rounding.h"
#include "common/vector.h"

namespace fitcompress {

constexpr float kRoundBits = 8388608.0f;  // x + 2^23 has the code of x in its last bits

struct GridGroup {
  bool steps = false;           // else fixed-point
  std::vector<float> factor;    // fixed-point: codes a unit of x; steps: Δ
  std::vector<float> zone;      // steps: codes are 0 below
  std::vector<double> spacing;  // of two codes
  std::vector<int64_t> max_code;
  size_t finest = 0;  // the grid with most codes
  size_t first = 0;   // its first grid's place among all grids
  size_t own = 0;     // how many grids it answers for; one more may follow, as their neighbour

  size_t size() const { return factor.size(); }
  int64_t cells() const {
    int64_t cells = 1;
    for (const int64_t codes : max_code) cells += codes;
    return cells;
  }

  // The index of the cell of x.
  int64_t cell(float x) const {
    int64_t cell = 0;
    for (size_t g = 0; g < size(); ++g) {
      const auto largest = static_cast<float>(max_code[g]);
      cell += static_cast<int64_t>(std::min(code(g, x), largest));
    }
    return cell;
  }

  // The least x of a cell with this index or a larger one.
  float first_x_of_cell(int64_t index) const {
    uint32_t below = 0, at = bits_of_float(INFINITY);  // bisection over bit patterns
    if (index <= 0) return 0.0f;
    while (at - below > 1) {
      const uint32_t middle = below + (at - below) / 2;
      (cell(float_of_bits(middle)) >= index ? at : below) = middle;
    }
    return float_of_bits(at);
  }

  void add(float factor_of_grid, float zone_of_grid, double spacing_of_grid, float max_x) {
    factor.push_back(factor_of_grid);
    zone.push_back(zone_of_grid);
    spacing.push_back(spacing_of_grid);
    max_code.push_back(static_cast<int64_t>(code(factor.size() - 1, max_x)));
    if (max_code.back() > max_code[finest]) finest = max_code.size() - 1;
  }

  float code(size_t grid, float x) const {
    if (steps) return x < zone[grid] ? 0.0f : round_even(x / factor[grid]);
    return round_even(x * factor[grid]);
  }

  // The least x of code `wanted` or a larger one: the product or quotient is rounded, so it is a
  // few float32 numbers away from where it would be without.
  float first_x(size_t grid, int64_t wanted) const {
    const auto least = static_cast<float>(wanted);
    auto x = static_cast<float>((static_cast<double>(wanted) - 0.5) * spacing[grid]);
    if (steps && x < zone[grid]) x = zone[grid];
    while (bits_of_float(x) > 0 && code(grid, float_of_bits(bits_of_float(x) - 1)) >= least) {
      x = float_of_bits(bits_of_float(x) - 1);
    }
    while (code(grid, x) < least) x = float_of_bits(bits_of_float(x) + 1);
    return x;
  }

  // K and the finest grid's code of `count` numbers, a multiple of 16.
  template <int Lanes>
  FITCOMPRESS_INLINE void index(const float* x, int64_t count, int32_t* cell,
                                float* finest_code) const {
    using Vector = typename VectorOf<Lanes>::Type;
    using Indices = typename VectorOf<Lanes>::Indices;
    const auto grids = static_cast<int64_t>(factor.size());
    const float* const factors = factor.data();
    const float* const zones = zone.data();
    for (int64_t j = 0; j < count; j += Lanes) {
      Vector value;
      std::memcpy(&value, x + j, sizeof(value));
      Indices sum = {};
      // 2^23 plus the code.
      const auto round = [&](int64_t g, Vector* rounded) __attribute__((always_inline)) {
        if (steps) {
          const Vector quotient = value / factors[g];
          *rounded = (value < zones[g] ? Vector{} : quotient) + kRoundBits;
        } else {
          *rounded = value * factors[g] + kRoundBits;
        }
      };
      Vector rounded;
      for (int64_t g = 0; g < grids; ++g) {
        round(g, &rounded);
        sum += (Indices)rounded - static_cast<int32_t>(bits_of_float(kRoundBits));
      }
      round(static_cast<int64_t>(finest), &rounded);
      const Vector fine = rounded - kRoundBits;
      std::memcpy(cell + j, &sum, sizeof(sum));
      std::memcpy(finest_code + j, &fine, sizeof(fine));
    }
  }
};

}  // namespace fitcompress
