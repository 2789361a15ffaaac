// The master problem of the decomposition: the cheapest mixture of plans within the budgets.
//
//   minimise Σ_i w_i value_i  subject to  Σ_i w_i share_i[m] ≤ 1 for every m, Σ_i w_i = 1, w ≥ 0.
//
// With a plan that costs nothing and has a forbidding value, so that there always is a mixture.
// Solved by the primal simplex method from where it stood before the last plan came; the basis has
// one row per budget and one more, so its inverse is computed anew in every step.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "search/multipliers.h"

namespace fitcompress {

class Mixture {
 public:
  Mixture(std::int32_t budgets, double forbidding);

  void forbid(double forbidding) { columns_[0].value = forbidding; }
  void add(const PricedPlan& plan) { columns_.push_back(plan); }
  // Returns the value of the best mixture.
  double solve();
  // Those of the last solution: its dual.
  PerBudget multipliers() const;
  // Plans of positive weight; reachable: whether the forbidding one is not among them.
  std::vector<MixedPlan> mix(bool* reachable) const;

 private:
  static constexpr std::size_t kRows = kMostBudgets + 1;
  using Vector = std::array<double, kRows>;

  // Columns: plans from 0 on; −1 − m is the slack of budget m.
  Vector column(std::int32_t index, double* value) const;
  bool invert();
  bool in_basis(std::int32_t index) const;

  std::size_t rows_;
  std::vector<PricedPlan> columns_;
  std::vector<std::int32_t> basis_;
  std::array<Vector, kRows> inverse_{};
  Vector weight_{};
  Vector dual_{};
  double value_ = 0.0;
};

}  // namespace fitcompress
