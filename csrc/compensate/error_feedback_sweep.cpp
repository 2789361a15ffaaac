// Error-feedback sweep on the CPU, in float64.
//
// Rows are independent: a thread owns a range of them and works on kGroup at a time, so that each
// element of U that is read serves kGroup rows. Updates are lazy: kPanel columns are quantized, the
// errors spread inside the panel only; then all later columns get the panel's updates at once, kept
// in registers meanwhile. Every element still receives its updates in the order of the columns,
// each a rounded product and a rounded difference, so the result has the same bits for any
// blocking, number of threads and instruction set. Bound: N²/2 multiplications and subtractions a
// row.
#include "compensate/error_feedback_sweep.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"

namespace fitcompress {
namespace {

constexpr int64_t kGroup = 32;
constexpr int64_t kPanel = 64;
constexpr double kCodeLimit = 2147483647.0;

struct Sweep {
  SweepShape shape;
  double* work;
  const double* factor;
  const double* scale;
  const uint8_t* mask;
  int32_t* codes;
};

// Quantizes columns [begin, end) of one row and leaves their errors e_j = (w_j − kΔ)/U_jj.
FITCOMPRESS_INLINE bool quantize_panel(const Sweep& s, int64_t row, int64_t begin, int64_t end,
                                       double* errors) {
  const int64_t cols = s.shape.cols;
  double* const w = s.work + row * cols;
  const double step = s.scale[s.shape.scale_per_row ? row : 0];
  bool ok = true;
  for (int64_t j = begin; j < end; ++j) {
    const double* const u = s.factor + j * cols;
    double code = 0.0;
    if (step > 0.0 && (s.mask == nullptr || s.mask[row * cols + j] != 0)) {
      code = round_even(w[j] / step);
      code = code < -s.shape.max_code ? -s.shape.max_code : code;
      code = code > s.shape.max_code ? s.shape.max_code : code;
      if (!(code >= -kCodeLimit && code <= kCodeLimit)) {
        ok = false;
        code = 0.0;
      }
    }
    s.codes[row * cols + j] = static_cast<int32_t>(code);
    const double error = (w[j] - code * step) / u[j];
    errors[j - begin] = error;
    for (int64_t c = j + 1; c < end; ++c) w[c] -= error * u[c];
  }
  return ok;
}

// w[r][c] −= Σ_j e[r][j] U[j][c] for Rows rows and Width columns from c on, in the order of j.
template <int Rows, int Width>
FITCOMPRESS_INLINE void update_tile(double* w, const double* u, int64_t cols, int64_t count,
                                    const double* errors) {
  double sum[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Width; ++c) sum[r][c] = w[r * cols + c];
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int r = 0; r < Rows; ++r) {
      const double error = errors[r * kPanel + j];
      for (int c = 0; c < Width; ++c) sum[r][c] -= error * u[j * cols + c];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Width; ++c) w[r * cols + c] = sum[r][c];
  }
}

template <int Width>
FITCOMPRESS_INLINE int64_t update_columns(const Sweep& s, int64_t row, int64_t rows, int64_t panel,
                                          int64_t count, int64_t begin, const double* errors) {
  const int64_t cols = s.shape.cols;
  int64_t c = begin;
  for (; c + Width <= cols; c += Width) {
    const double* const u = s.factor + panel * cols + c;
    double* const w = s.work + row * cols + c;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      update_tile<4, Width>(w + r * cols, u, cols, count, errors + r * kPanel);
    }
    for (; r < rows; ++r) update_tile<1, Width>(w + r * cols, u, cols, count, errors + r * kPanel);
  }
  return c;
}

template <int Lanes>
FITCOMPRESS_INLINE bool sweep_rows(const Sweep& s, int64_t first, int64_t last) {
  double errors[kGroup * kPanel];
  bool ok = true;
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t rows = std::min(kGroup, last - row);
    for (int64_t panel = 0; panel < s.shape.cols; panel += kPanel) {
      const int64_t end = std::min(panel + kPanel, s.shape.cols);
      for (int64_t r = 0; r < rows; ++r) {
        ok &= quantize_panel(s, row + r, panel, end, errors + r * kPanel);
      }
      const int64_t c = update_columns<Lanes>(s, row, rows, panel, end - panel, end, errors);
      update_columns<1>(s, row, rows, panel, end - panel, c, errors);
    }
  }
  return ok;
}

}  // namespace

bool error_feedback_sweep_cpu(SweepShape shape, double* work, const double* factor,
                              const double* scale, const uint8_t* mask, int32_t* codes) {
  const Sweep sweep{shape, work, factor, scale, mask, codes};
  std::atomic<bool> ok{true};
  parallel_for(shape.rows, 1, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
      if (!sweep_rows<lanes>(sweep, first, last)) ok = false;
    });
  });
  return ok;
}

}  // namespace fitcompress
