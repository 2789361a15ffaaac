// How ghost_norms takes a layer apart; depends on its shape only.
//
// A stride s sorts the offsets d k of the kernel by their remainder: those of one remainder read
// the same part of the input, every s-th place of it, and there they are the layer's stride-1
// problem with other offsets. All parts and the output are numbered by one grid, as wide as an
// output position and its largest shift need: position p has the number u(p) of its first place,
// and an offset of the kernel adds a constant.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "common/vector.h"
#include "fisher/weight_grad.h"

namespace fitcompress {

struct GhostPart {
  int64_t origin;               // in the input, of place 0
  std::vector<int64_t> shifts;  // in numbers of the grid
  // By depth, height and width: whether an output position reads that place.
  std::array<std::vector<bool>, 3> needed;
};

struct GhostPlan {
  explicit GhostPlan(const WeightGradShape& shape);

  // Number of position p of a sample in the grid.
  int64_t number(int64_t p) const {
    const int64_t w = p % places[2], h = p / places[2] % places[1];
    const int64_t d = p / places[2] / places[1] % places[0], n = p / image_positions;
    return n * image + (d * grid[1] + h) * grid[2] + w;
  }

  std::array<int64_t, 3> places;  // of the output, depth, height, width
  std::array<int64_t, 3> grid;    // the same and the largest shift of any part
  std::vector<GhostPart> parts;
  int64_t image_positions, positions;  // of an image, of a sample
  int64_t image;                       // numbers an image takes
  int64_t halo;                        // the largest shift
  int64_t block, blocks;               // positions of a block; blocks of a sample
  int64_t length;                      // most numbers from the first to the last of a block
};

}  // namespace fitcompress
