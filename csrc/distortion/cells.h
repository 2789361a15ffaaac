// From sums per (cell, class) to the tables.
#pragma once

#include <cstdint>
#include <vector>

#include "distortion/distortion_table.h"
#include "distortion/grid_group.h"
#include "distortion/slots.h"

namespace fitcompress {

// Sums of every grid over every class: [G, classes] each, a row padded to kPad entries.
struct ClassSums {
  static constexpr int64_t kPad = 8;

  int64_t grids, classes, pitch;
  std::vector<double> error;    // Σ F (θ − θ̂)²
  std::vector<double> norm;     // Σ F θ̂²
  std::vector<double> to_next;  // Σ F (θ̂ − θ̂ of the next grid)²
  std::vector<double>
      code_logs;  // Σ c log₂ c over the counts c of non-zero codes, this class and up
  std::vector<int64_t> nonzero;  // number of non-zero codes, this class only
  std::vector<double> pruned;    // [classes]: Σ F θ²

  ClassSums(int64_t grid_count, int64_t class_count);
};

// Walks over the cells of a group in ascending order, in any number of calls.
class CellWalk {
 public:
  CellWalk(const GridGroup& group, ClassSums* sums, bool sum_pruned);

  // Adds the cells of these tables, which follow on those of the last call.
  void add(const SlotTables& tables);
  // Counts the last code of every grid.
  void finish();

 private:
  struct Codes {                    // of one grid
    int64_t code = 0;               // in the present cell
    float next = 0;                 // x at which the next one begins
    bool counted = false;           // whether the counts are not all 0
    std::vector<int64_t> count[2];  // of the present code, by sign and class
  };

  void gather(const SlotTables& tables, int64_t cell);
  void add_cell();
  void next_cell();
  void count_code(size_t grid);
  float next_x(size_t grid) const;

  const GridGroup& group_;
  ClassSums* sums_;
  bool sum_pruned_;
  std::vector<Codes> codes_;
  std::vector<double> moment_[3];
  std::vector<int64_t> number_[2];
  bool empty_ = true;
};

// Cells of the tables: at sparsity s the classes up to s are masked, those above are kept.
void fill_tables(const ClassSums& sums, int64_t count, const DistortionTable& table);

}  // namespace fitcompress
