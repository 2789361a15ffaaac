#include "search/mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fitcompress {

namespace {

constexpr int kMostPivots = 100;
constexpr double kNothing = 1e-12;  // of a weight

}  // namespace

Mixture::Mixture(std::int32_t budgets, double forbidding)
    : rows_(static_cast<std::size_t>(budgets) + 1) {
  columns_.push_back({forbidding, {}, {}});
  basis_.push_back(0);
  for (std::int32_t m = 0; m < budgets; ++m) basis_.push_back(-1 - m);
}

Mixture::Vector Mixture::column(std::int32_t index, double* value) const {
  Vector entries{};
  *value = 0.0;
  if (index < 0) {
    entries[static_cast<std::size_t>(-1 - index)] = 1.0;
    return entries;
  }
  const PricedPlan& plan = columns_[static_cast<std::size_t>(index)];
  for (std::size_t m = 0; m + 1 < rows_; ++m) entries[m] = plan.share[m];
  entries[rows_ - 1] = 1.0;
  *value = plan.value;
  return entries;
}

bool Mixture::in_basis(std::int32_t index) const {
  return std::find(basis_.begin(), basis_.end(), index) != basis_.end();
}

// Gauss and Jordan, with row pivoting; false if the basis is singular.
bool Mixture::invert() {
  std::array<Vector, kRows> matrix{};
  Vector values{};
  for (std::size_t j = 0; j < rows_; ++j) {
    const Vector entries = column(basis_[j], &values[j]);
    for (std::size_t i = 0; i < rows_; ++i) {
      matrix[i][j] = entries[i];
      inverse_[i][j] = i == j ? 1.0 : 0.0;
    }
  }
  for (std::size_t p = 0; p < rows_; ++p) {
    std::size_t pivot = p;
    for (std::size_t i = p + 1; i < rows_; ++i) {
      if (std::abs(matrix[i][p]) > std::abs(matrix[pivot][p])) pivot = i;
    }
    if (!(std::abs(matrix[pivot][p]) > 0.0)) return false;
    std::swap(matrix[p], matrix[pivot]);
    std::swap(inverse_[p], inverse_[pivot]);
    const double scale = 1.0 / matrix[p][p];
    for (std::size_t j = 0; j < rows_; ++j) {
      matrix[p][j] *= scale;
      inverse_[p][j] *= scale;
    }
    for (std::size_t i = 0; i < rows_; ++i) {
      const double factor = matrix[i][p];
      if (i == p || factor == 0.0) continue;
      for (std::size_t j = 0; j < rows_; ++j) {
        matrix[i][j] -= factor * matrix[p][j];
        inverse_[i][j] -= factor * inverse_[p][j];
      }
    }
  }
  value_ = 0.0;
  for (std::size_t i = 0; i < rows_; ++i) {
    weight_[i] = 0.0;
    for (std::size_t j = 0; j < rows_; ++j) weight_[i] += inverse_[i][j];  // right-hand sides are 1
    value_ += values[i] * weight_[i];
  }
  for (std::size_t j = 0; j < rows_; ++j) {
    dual_[j] = 0.0;
    for (std::size_t i = 0; i < rows_; ++i) dual_[j] += values[i] * inverse_[i][j];
  }
  return true;
}

double Mixture::solve() {
  for (int pivots = 0; pivots < kMostPivots; ++pivots) {
    if (!invert()) break;
    std::int32_t entering = 0;
    Vector entering_column{};
    double least = -1e-12 * std::abs(value_);
    bool found = false;
    for (auto c = 1 - static_cast<std::int32_t>(rows_);
         c < static_cast<std::int32_t>(columns_.size()); ++c) {
      double reduced = 0.0;
      const Vector entries = column(c, &reduced);
      for (std::size_t i = 0; i < rows_; ++i) reduced -= dual_[i] * entries[i];
      if (reduced >= least || in_basis(c)) continue;
      least = reduced;
      entering = c;
      entering_column = entries;
      found = true;
    }
    if (!found) break;
    std::size_t leaving = rows_;
    double shortest = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < rows_; ++i) {
      double rise = 0.0;
      for (std::size_t j = 0; j < rows_; ++j) rise += inverse_[i][j] * entering_column[j];
      if (rise <= 1e-13) continue;
      const double length = std::max(weight_[i], 0.0) / rise;
      if (length < shortest) {
        shortest = length;
        leaving = i;
      }
    }
    if (leaving == rows_) break;
    basis_[leaving] = entering;
  }
  return value_;
}

PerBudget Mixture::multipliers() const {
  PerBudget result{};
  for (std::size_t m = 0; m + 1 < rows_; ++m) result[m] = std::max(0.0, -dual_[m]);
  return result;
}

std::vector<MixedPlan> Mixture::mix(bool* reachable) const {
  std::vector<MixedPlan> plans;
  *reachable = true;
  for (std::size_t i = 0; i < rows_; ++i) {
    if (basis_[i] < 0 || weight_[i] <= kNothing) continue;
    if (basis_[i] == 0) {
      *reachable = false;
    } else {
      plans.push_back({weight_[i], columns_[static_cast<std::size_t>(basis_[i])].multipliers});
    }
  }
  return plans;
}

}  // namespace fitcompress
