// Beam search over the codes of each row on the CPU, in float64.
//
// A thread owns a group of rows at a time. As in the plain sweep, kPanel columns are decided with
// updates inside the panel only: there each path has its own copy of the panel, and a new path
// writes its copy while it reads its parent's. Which parent, code and error a path has is noted
// column by column. At the panel's end every path follows the notes back to its ancestor at the
// panel's start, and gets that one's later columns with all updates at once, in tiles of registers;
// the paths of the group share what is read of U. Every element receives its updates in the order
// of the columns, each a rounded product and a rounded difference, so the result has the same bits
// for any blocking, number of threads and instruction set. Bound: N²/2 multiplications and
// subtractions a path.
#include "compensate/beam_sweep.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <utility>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "compensate/beam_selection.h"

namespace fitcompress {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kPiece = 8;         // columns of a panel that are updated at a time
constexpr int64_t kGroupPaths = 32;   // paths that share what is read of U
constexpr int64_t kLeastGroups = 16;  // in a large matrix: work for many threads

struct Problem {
  const BeamSweep& sweep;
  const double* weight;
  const double* factor;
  const double* scale;
  const uint8_t* mask;
  int32_t* codes;
  int64_t rows, cols, beam;
  int64_t group;  // rows
};

struct Panel {
  int64_t begin, width;
};

// The later columns of a path: `from` with the errors of a panel.
struct Update {
  const double* from;
  double* to;
  const double* errors;
};

template <int Lanes>
struct VectorOf {
  typedef double Type __attribute__((vector_size(Lanes * sizeof(double))));
};

// What a thread needs.
struct Memory {
  explicit Memory(const Problem& p)
      : later(make_buffer<double>(p.group * p.beam * p.cols)),
        later_before(make_buffer<double>(p.group * p.beam * p.cols)),
        cost(make_buffer<double>(p.group * p.beam)),
        paths(make_buffer<int64_t>(p.group)),
        parent(make_buffer<int32_t>(p.group * p.cols * p.beam)),
        code(make_buffer<int32_t>(p.group * p.cols * p.beam)),
        error(make_buffer<double>(kPanel * p.beam)),
        panel(make_buffer<double>(p.beam * kPanel)),
        panel_before(make_buffer<double>(p.beam * kPanel)),
        factor(make_buffer<double>(kPanel * kPanel)),
        strip(make_buffer<double>(kPanel * kMostLanes)),
        traced(make_buffer<double>(p.group * p.beam * kPanel)),
        updates(make_buffer<Update>(p.group * p.beam)),
        proposals(p.beam) {}

  Buffer<double> later, later_before;  // [row][path][column], and at the panel's start
  Buffer<double> cost;                 // [row][path]
  Buffer<int64_t> paths;               // [row]
  Buffer<int32_t> parent, code;        // [row][column][path]
  Buffer<double> error;                // [column of the panel][path], of one row
  Buffer<double> panel, panel_before;  // [path][column of the panel], of one row
  Buffer<double> factor;               // U inside the panel
  Buffer<double> strip;                // U in the columns of a tile
  Buffer<double> traced;               // [row][path][column of the panel]: errors of its ancestors
  Buffer<Update> updates;
  Proposals proposals;
};

// Proposes codes for column j and selects the new paths; returns their number, 0 on failure.
template <int Lanes>
FITCOMPRESS_INLINE int64_t select_codes(const Problem& p, Memory& memory, int64_t row, int64_t j,
                                        int64_t paths, const double* cost, int64_t* choices) {
  const BeamSweep& sweep = p.sweep;
  const double step = p.scale[sweep.shape.scale_per_row ? row : 0];
  const ProposalRule rule{step, p.factor[j * p.cols + j], sweep.shape.max_code,
                          sweep.rate * step * step, sweep.bits};
  const bool free = step > 0.0 && (p.mask == nullptr || p.mask[row * p.cols + j] != 0);
  const Proposals& to = memory.proposals;
  bool ok = true;
  if (sweep.rate > 0.0) {
    *choices = free ? 4 : 1;
    ok = free ? propose<4, true>(rule, paths, cost, to) : propose<1, true>(rule, paths, cost, to);
  } else {
    *choices = free ? 2 : 1;
    ok = free ? propose<2, false>(rule, paths, cost, to) : propose<1, false>(rule, paths, cost, to);
  }
  return ok ? select<Lanes>(paths, *choices, p.beam, to) : 0;
}

// Decides the panel's columns of row g of the group; returns false on failure.
template <int Lanes>
FITCOMPRESS_INLINE bool decide_panel(const Problem& p, Memory& memory, Panel panel, int64_t row,
                                     int64_t g) {
  double* const cost = memory.cost.get() + g * p.beam;
  int64_t paths = memory.paths[g];
  const Proposals& proposals = memory.proposals;
  for (int64_t i = 0; i < panel.width; ++i) {
    const int64_t j = panel.begin + i;
    for (int64_t s = 0; s < paths; ++s) proposals.value[s] = memory.panel[s * kPanel + i];
    int64_t choices = 1;
    paths = select_codes<Lanes>(p, memory, row, j, paths, cost, &choices);
    if (paths == 0) return false;

    std::swap(memory.panel, memory.panel_before);
    int32_t* const parents = memory.parent.get() + (g * p.cols + j) * p.beam;
    int32_t* const codes = memory.code.get() + (g * p.cols + j) * p.beam;
    double* const errors = memory.error.get() + i * p.beam;
    const double* const u = memory.factor.get() + i * kPanel;
    const int32_t shift = choices == 4 ? 2 : static_cast<int32_t>(choices) - 1;
    for (int64_t s = 0; s < paths; ++s) {
      const int32_t chosen = proposals.order[s];
      const double error = proposals.error[chosen];
      parents[s] = chosen >> shift;
      codes[s] = static_cast<int32_t>(proposals.code[chosen]);
      errors[s] = error;
      cost[s] = proposals.cost[chosen];
      const double* const from = memory.panel_before.get() + parents[s] * kPanel;
      double* const to = memory.panel.get() + s * kPanel;
      // Whole pieces: columns that are decided are not read again.
      for (int64_t c = (i + 1) / kPiece * kPiece; c < kPanel; c += kPiece) {
        double piece[kPiece];
        for (int l = 0; l < kPiece; ++l) piece[l] = from[c + l] - error * u[c + l];
        for (int l = 0; l < kPiece; ++l) to[c + l] = piece[l];
      }
    }
  }
  memory.paths[g] = paths;
  return true;
}

// Follows path `slot` of row g back through the panel, leaves the errors on the way, and returns
// the path it comes from.
FITCOMPRESS_INLINE int64_t trace_errors(const Problem& p, const Memory& memory, Panel panel,
                                        int64_t g, int64_t slot, double* errors) {
  for (int64_t i = panel.width; i-- > 0;) {
    errors[i] = memory.error[i * p.beam + slot];
    slot = memory.parent[(g * p.cols + panel.begin + i) * p.beam + slot];
  }
  return slot;
}

// to[r][c] = from[r][c] − Σ_j e[r][j] U[j][c] for Rows paths and Width columns from `column` on, in
// the order of j. Vectors are spelled out where there are two, as compilers would rather go over
// several j at a time, and shuffle.
template <int Rows, int Width>
FITCOMPRESS_INLINE void update_tile(const Update* updates, int64_t column, int64_t count,
                                    const double* strip) {
  constexpr int kLanes = Width == 1 ? 1 : Width / 2, kVectors = Width / kLanes;
  using Vector = typename VectorOf<kLanes>::Type;
  constexpr size_t kBytes = sizeof(Vector);
  Vector sum[Rows][kVectors], u[kVectors];
  for (int r = 0; r < Rows; ++r) {
    const double* const from = updates[r].from + column;
    for (int v = 0; v < kVectors; ++v) std::memcpy(&sum[r][v], from + v * kLanes, kBytes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const double* const from = strip + j * Width;
    for (int v = 0; v < kVectors; ++v) std::memcpy(&u[v], from + v * kLanes, kBytes);
    for (int r = 0; r < Rows; ++r) {
      const double error = updates[r].errors[j];
      for (int v = 0; v < kVectors; ++v) sum[r][v] -= error * u[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    double* const to = updates[r].to + column;
    for (int v = 0; v < kVectors; ++v) std::memcpy(to + v * kLanes, &sum[r][v], kBytes);
  }
}

// Applies the updates to the columns from `column` on that fill tiles; returns the first left.
template <int Width>
FITCOMPRESS_INLINE int64_t update_columns(const Problem& p, const Memory& memory, Panel panel,
                                          int64_t count, int64_t column) {
  double* const strip = memory.strip.get();
  const Update* const updates = memory.updates.get();
  for (; column + Width <= p.cols; column += Width) {
    for (int64_t j = 0; j < panel.width; ++j) {
      const double* const u = p.factor + (panel.begin + j) * p.cols + column;
      for (int c = 0; c < Width; ++c) strip[j * Width + c] = u[c];
    }
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) update_tile<4, Width>(updates + r, column, panel.width, strip);
    for (; r < count; ++r) update_tile<1, Width>(updates + r, column, panel.width, strip);
  }
  return column;
}

// Copies U inside the panel, with zeros after it.
FITCOMPRESS_INLINE void load_factor(const Problem& p, const Memory& memory, Panel panel) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const double* const u = p.factor + (panel.begin + i) * p.cols + panel.begin;
    double* const to = memory.factor.get() + i * kPanel;
    std::fill_n(to, kPanel, 0.0);
    if (i < panel.width) std::copy_n(u, panel.width, to);
  }
}

// Searches rows [first, first + count), which are a group; returns false on failure.
template <int Lanes>
FITCOMPRESS_INLINE bool search_group(const Problem& p, Memory& memory, int64_t first,
                                     int64_t count) {
  std::fill_n(memory.paths.get(), count, 1);
  for (int64_t g = 0; g < count; ++g) memory.cost[g * p.beam] = 0.0;
  for (Panel panel{0, 0}; panel.begin < p.cols; panel.begin += panel.width) {
    panel.width = std::min(kPanel, p.cols - panel.begin);
    load_factor(p, memory, panel);
    const int64_t end = panel.begin + panel.width;
    std::swap(memory.later, memory.later_before);
    int64_t updates = 0;
    for (int64_t g = 0; g < count; ++g) {
      const double* const before = panel.begin == 0
                                       ? p.weight + (first + g) * p.cols
                                       : memory.later_before.get() + g * p.beam * p.cols;
      for (int64_t s = 0; s < memory.paths[g]; ++s) {
        const double* const from = before + s * p.cols + panel.begin;
        double* const to = memory.panel.get() + s * kPanel;
        std::fill(std::copy_n(from, panel.width, to), to + kPanel, 0.0);
      }
      if (!decide_panel<Lanes>(p, memory, panel, first + g, g)) return false;
      if (end == p.cols) continue;
      for (int64_t s = 0; s < memory.paths[g]; ++s, ++updates) {
        double* const errors = memory.traced.get() + updates * kPanel;
        const int64_t ancestor = trace_errors(p, memory, panel, g, s, errors);
        double* const to = memory.later.get() + (g * p.beam + s) * p.cols;
        memory.updates[updates] = {before + ancestor * p.cols, to, errors};
      }
    }
    const int64_t left = update_columns<Lanes>(p, memory, panel, updates, end);
    update_columns<1>(p, memory, panel, updates, left);
  }
  for (int64_t g = 0; g < count; ++g) {
    int64_t slot = 0;
    for (int64_t j = p.cols; j-- > 0;) {
      const int64_t note = (g * p.cols + j) * p.beam + slot;
      p.codes[(first + g) * p.cols + j] = memory.code[note];
      slot = memory.parent[note];
    }
  }
  return true;
}

}  // namespace

bool beam_sweep_cpu(const BeamSweep& sweep, const double* weight, const double* factor,
                    const double* scale, const uint8_t* mask, int32_t* codes) {
  const int64_t rows = sweep.shape.rows, cols = sweep.shape.cols;
  if (rows == 0 || cols == 0) return true;
  const int64_t group =
      std::max<int64_t>(1, std::min(kGroupPaths / sweep.beam, rows / kLeastGroups));
  const Problem problem{sweep, weight, factor, scale, mask, codes, rows, cols, sweep.beam, group};
  const int64_t groups = (rows + group - 1) / group;
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  parallel_for(groups, 1, [&](int64_t, int64_t) {
    try {
      Memory memory(problem);
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        for (int64_t g = next++; g < groups; g = next++) {
          const int64_t first = g * problem.group;
          const int64_t count = std::min(problem.group, problem.rows - first);
          if (!search_group<lanes>(problem, memory, first, count)) ok = false;
        }
      });
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < groups) throw std::bad_alloc();
  return ok;
}

}  // namespace fitcompress
