// Evaluation of cells: the cells of a group in ascending order, all classes at once.
//
// In a cell every grid has one code, and from a cell to the next one code changes. With a the
// distance of a grid's value from that of the finest grid, Σ F'(x − v)² = m₂ + 2a·m₁ + a²·m₀; this
// does not cancel, as m₁ and m₂ are sums over distances. Codes are counted until they change, and
// counts then enter nnz and entropy. One thread; bound: about 10 operations a grid, cell that is
// not empty, and class.
#include "distortion/cells.h"

#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "common/vector.h"

namespace fitcompress {
namespace {

constexpr int64_t kTabled = 4096;

// c log₂ c.
double count_log(int64_t count) {
  static const std::vector<double> table = [] {
    std::vector<double> values(kTabled, 0.0);
    for (size_t c = 2; c < values.size(); ++c) {
      values[c] = static_cast<double>(c) * std::log2(static_cast<double>(c));
    }
    return values;
  }();
  if (count < kTabled) return table[static_cast<size_t>(count)];
  return static_cast<double>(count) * std::log2(static_cast<double>(count));
}

}  // namespace

ClassSums::ClassSums(int64_t grid_count, int64_t class_count)
    : grids(grid_count), classes(class_count), pitch(round_up(class_count, kPad)) {
  const auto size = static_cast<size_t>(grids * pitch);
  error.resize(size);
  norm.resize(size);
  to_next.resize(size);
  code_logs.resize(size);
  nonzero.resize(size);
  pruned.resize(static_cast<size_t>(pitch));
}

CellWalk::CellWalk(const GridGroup& group, ClassSums* sums, bool sum_pruned)
    : group_(group), sums_(sums), sum_pruned_(sum_pruned), codes_(group.size()) {
  const auto pitch = static_cast<size_t>(sums->pitch);
  for (size_t g = 0; g < codes_.size(); ++g) {
    for (auto& count : codes_[g].count) count.resize(pitch);
    codes_[g].next = next_x(g);
  }
  for (auto& moment : moment_) moment.resize(pitch);
  for (auto& number : number_) number.resize(pitch);
}

float CellWalk::next_x(size_t grid) const {
  const int64_t code = codes_[grid].code;
  return code == group_.max_code[grid] ? INFINITY : group_.first_x(grid, code + 1);
}

void CellWalk::add(const SlotTables& tables) {
  for (int64_t cell = tables.first_cell; cell < tables.last_cell; ++cell) {
    if (cell > 0) next_cell();
    gather(tables, cell);
    if (!empty_) add_cell();
  }
}

void CellWalk::finish() {
  for (size_t g = 0; g < codes_.size(); ++g) count_code(g);
}

void CellWalk::gather(const SlotTables& tables, int64_t cell) {
  empty_ = true;
  for (int64_t k = 0; k < tables.classes; ++k) {
    const auto at = static_cast<size_t>(k);
    double moment[3] = {};
    int64_t number[2] = {};
    for (int64_t chunk = 0; chunk < tables.chunks; ++chunk) {
      const Slot& slot = tables.row(chunk, cell)[k];
      for (int m = 0; m < 3; ++m) moment[m] += slot.moment[m];
      const auto numbers = static_cast<int64_t>(slot.numbers);
      number[0] += numbers % static_cast<int64_t>(kNegative);
      number[1] += numbers / static_cast<int64_t>(kNegative);
    }
    for (size_t m = 0; m < 3; ++m) moment_[m][at] = moment[m];
    for (size_t n = 0; n < 2; ++n) number_[n][at] = number[n];
    empty_ = empty_ && number[0] == 0 && number[1] == 0;
  }
}

void CellWalk::add_cell() {
  const int64_t pitch = sums_->pitch;
  const double* const m0 = moment_[0].data();
  const double* const m1 = moment_[1].data();
  const double* const m2 = moment_[2].data();
  const auto value_of = [&](size_t g) {
    return static_cast<double>(codes_[g].code) * group_.spacing[g];
  };
  const double finest = value_of(group_.finest);
  if (sum_pruned_) {
    for (int64_t k = 0; k < pitch; ++k) {
      sums_->pruned[static_cast<size_t>(k)] += m2[k] + finest * (2.0 * m1[k] + finest * m0[k]);
    }
  }
  dispatch_isa([&](auto) __attribute__((always_inline)) {
    for (size_t g = 0; g < group_.own; ++g) {
      const double value = value_of(g);
      const double a = finest - value;
      const double norm = value * value;
      const double step = g + 1 < codes_.size() ? value - value_of(g + 1) : 0.0;
      const double to_next = step * step;
      const size_t row = (group_.first + g) * static_cast<size_t>(pitch);
      double* const error_sum = sums_->error.data() + row;
      double* const norm_sum = sums_->norm.data() + row;
      double* const next_sum = sums_->to_next.data() + row;
      for (int64_t k = 0; k < pitch; ++k) {
        const double error = m2[k] + a * (2.0 * m1[k] + a * m0[k]);
        error_sum[k] += error > 0.0 ? error : 0.0;
        norm_sum[k] += norm * m0[k];
        next_sum[k] += to_next * m0[k];
      }
      Codes& codes = codes_[g];
      if (codes.code == 0) continue;
      codes.counted = true;
      for (size_t sign = 0; sign < 2; ++sign) {
        int64_t* const count = codes.count[sign].data();
        const int64_t* const number = number_[sign].data();
        for (int64_t k = 0; k < pitch; ++k) count[k] += number[k];
      }
    }
  });
}

void CellWalk::next_cell() {
  size_t changing = 0;
  for (size_t g = 1; g < codes_.size(); ++g) {
    if (codes_[g].next < codes_[changing].next) changing = g;
  }
  count_code(changing);
  ++codes_[changing].code;
  codes_[changing].next = next_x(changing);
}

void CellWalk::count_code(size_t grid) {
  Codes& codes = codes_[grid];
  if (!codes.counted) return;
  codes.counted = false;
  const size_t row = (group_.first + grid) * static_cast<size_t>(sums_->pitch);
  for (auto& counts : codes.count) {
    int64_t total = 0;
    double log = 0.0;
    for (auto k = static_cast<size_t>(sums_->classes); k-- > 0;) {
      if (counts[k] > 0) {
        sums_->nonzero[row + k] += counts[k];
        total += counts[k];
        log = count_log(total);
      }
      sums_->code_logs[row + k] += log;
    }
    std::fill(counts.begin(), counts.end(), int64_t{0});
  }
}

void fill_tables(const ClassSums& sums, int64_t count, const DistortionTable& table) {
  const int64_t sparsities = sums.classes - 1;
  for (int64_t g = 0; g < sums.grids; ++g) {
    const size_t row = static_cast<size_t>(g * sums.pitch);
    double pruned = 0, error = 0, norm = 0, to_next = 0;
    int64_t nonzero = 0;
    for (int64_t s = 0; s < sparsities; ++s) {
      pruned += sums.pruned[static_cast<size_t>(s)];
      table.distortion[g * sparsities + s] = 0.5 * pruned;
    }
    for (int64_t s = sparsities; s-- > 0;) {
      const size_t kept = row + static_cast<size_t>(s) + 1;
      const int64_t cell = g * sparsities + s;
      error += sums.error[kept];
      norm += sums.norm[kept];
      to_next += sums.to_next[kept];
      nonzero += sums.nonzero[kept];
      table.distortion[cell] += 0.5 * error;
      table.norm[cell] = norm;
      table.grid_length[cell] = to_next;
      table.prune_length[cell] = s + 1 == sparsities ? 0.0 : sums.norm[kept];
      table.nnz[cell] = nonzero;
      // n·H = n log n − Σ c log c over the kept codes that are not 0 and the rest, which are.
      table.entropy_bits[cell] =
          std::max(0.0, count_log(count) - (sums.code_logs[kept] + count_log(count - nonzero)));
    }
  }
}

}  // namespace fitcompress
