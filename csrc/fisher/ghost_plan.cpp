#include "fisher/ghost_plan.h"

namespace fitcompress {
namespace {

constexpr int64_t kMaxLength = 1024;          // numbers of a block with its halo: 4 MiB a matrix
constexpr int64_t kMaxPointwiseLength = 256;  // without shifts, where blocks cost nothing
constexpr int64_t kMinBlock = 128;            // no smaller ones for the sake of more tasks
constexpr int64_t kWhole = 16;                // whole vectors
constexpr int64_t kTasks = 8;

// The offsets of one dimension that share a part.
struct AxisPart {
  int64_t origin;
  std::vector<int64_t> shifts;
};

// `apart`: each offset its own part, without shifts.
std::vector<AxisPart> axis_parts(int64_t kernel, int64_t stride, int64_t dilation, bool apart) {
  std::vector<AxisPart> parts;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t offset = k * dilation;
    const auto same = std::find_if(parts.begin(), parts.end(), [&](const AxisPart& part) {
      return !apart && (offset - part.origin) % stride == 0;
    });
    if (same == parts.end()) {
      parts.push_back({offset, {0}});
    } else {
      same->shifts.push_back((offset - same->origin) / stride);
    }
  }
  return parts;
}

}  // namespace

GhostPlan::GhostPlan(const WeightGradShape& shape) : places(shape.places) {
  image_positions = shape.positions();
  positions = shape.images * image_positions;
  blocks = 0;
  if (positions == 0) return;

  // Blocks of a large input carry a halo. Where that gets out of hand, as in depth, shifts are
  // taken for parts of their own.
  std::array<std::vector<AxisPart>, 3> axes;
  for (size_t apart = 0; apart <= 3; ++apart) {
    for (size_t i = 0; i < 3; ++i) {
      axes[i] = axis_parts(shape.kernel[i], shape.stride[i], shape.dilation[i], i < apart);
      grid[i] = places[i];
      for (const AxisPart& part : axes[i]) {
        grid[i] = std::max(grid[i], places[i] + part.shifts.back());
      }
    }
    image = grid[0] * grid[1] * grid[2];
    halo = ((grid[0] - places[0]) * grid[1] + grid[1] - places[1]) * grid[2] + grid[2] - places[2];
    if (shape.images * image <= kMaxLength || halo <= kMaxLength / 2) break;
  }

  for (const AxisPart& depth : axes[0])
    for (const AxisPart& height : axes[1])
      for (const AxisPart& width : axes[2]) {
        GhostPart part{};
        const AxisPart* const along[] = {&depth, &height, &width};
        for (size_t i = 0; i < 3; ++i) {
          part.origin += along[i]->origin * shape.input_strides[i + 2];
          part.needed[i].assign(static_cast<size_t>(grid[i]), false);
          for (const int64_t shift : along[i]->shifts)
            for (int64_t p = 0; p < places[i]; ++p)
              part.needed[i][static_cast<size_t>(p + shift)] = true;
        }
        for (const int64_t d : depth.shifts)
          for (const int64_t h : height.shifts)
            for (const int64_t w : width.shifts)
              part.shifts.push_back((d * grid[1] + h) * grid[2] + w);
        parts.push_back(std::move(part));
      }

  const int64_t limit = halo == 0 ? kMaxPointwiseLength : kMaxLength;
  const int64_t least = std::max(kMinBlock, 4 * halo);
  blocks = 1;
  const auto fits = [&] {
    block = ceil_div(positions, blocks);
    if (blocks > 1 && block > kWhole) block = ceil_div(block, kWhole) * kWhole;
    length = 0;
    for (int64_t p = 0; p < positions; p += block) {
      const int64_t last = std::min(p + block, positions) - 1;
      length = std::max(length, number(last) - number(p) + 1);
    }
    return length + halo <= limit || block == 1;
  };
  while (!fits()) ++blocks;
  while (shape.samples * shape.groups * blocks * (blocks + 1) / 2 < kTasks &&
         ceil_div(positions, blocks + 1) >= least) {
    ++blocks;
  }
  fits();
  blocks = ceil_div(positions, block);
}

}  // namespace fitcompress
