// norms[b] += scale · ‖G_b‖² of 3×3 convolutions on the CPU, by Winograd's minimal filtering.
//
// The gradient is cut into tiles of 4 × 4 places, each of which sees 6 × 6 inputs
// (winograd_transform.h). A task owns some outputs of one sample: it transforms all tiles of both
// tensors, multiplies, for each of the 36 points, outputs × tiles with tiles × channels, and
// transforms the products back, nine values of G_b for each output and channel, which it squares.
// Products are summed in float32, squares too over at most 32 outputs, then in float64.
// Bound: 36 · tiles · O · C multiply-adds of a sample at the rate of a matrix product, a quarter of
// those of the direct form. Transforms and squares take the time of about 400 multiply-adds for
// each tile and channel, 300 for each tile and output, and 200 for each output and channel.

#include "fisher/winograd_norms.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "fisher/gram.h"
#include "fisher/pack.h"
#include "fisher/winograd_plan.h"
#include "fisher/winograd_transform.h"

namespace fitcompress {
namespace {

struct WinogradScratch {
  explicit WinogradScratch(const WinogradPlan& plan)
      : stage(make_buffer<float>(plan.stage)),
        inputs(make_buffer<float>(kPoints * plan.input_stride)),
        grads(make_buffer<float>(kPoints * plan.grad_stride)),
        products(make_buffer<float>(plan.kept_blocks * plan.block_size)) {}

  Buffer<float> stage, inputs, grads, products;
};

// Transforms a row of tiles of one panel of lanes, `tall` × `wide` places packed without gaps. What
// a tile lacks at the lower and right border is zero.
template <int Lanes, int Size>
FITCOMPRESS_INLINE void transform_row(const float* stage, int64_t tall, int64_t wide, int64_t tiles,
                                      float* to, int64_t stride) {
  const int64_t pitch = wide * Lanes;
  for (int64_t j = 0; j < tiles; ++j, stage += kTile * Lanes, wide -= kTile, to += Lanes) {
    if (tall >= Size && wide >= Size) {
      transform_tile<Lanes, Size>(stage, pitch, to, stride);
      continue;
    }
    alignas(64) float edge[Size * Size * Lanes] = {};
    const int64_t count = std::min<int64_t>(Size, wide) * Lanes;
    for (int64_t h = 0; h < std::min<int64_t>(Size, tall); ++h) {
      std::memcpy(edge + h * Size * Lanes, stage + h * pitch,
                  static_cast<size_t>(count) * sizeof(float));
    }
    transform_tile<Lanes, Size>(edge, Size * Lanes, to, stride);
  }
}

// Transforms `lanes` channels of a tensor, panel after panel; Size tells which of the two it is.
// Packs one row of tiles at a time, each value once.
template <int Lanes, int Size>
FITCOMPRESS_INLINE void transform(const WinogradPlan& plan, const WinogradSegment& segment,
                                  const float* data, const std::array<int64_t, 5>& strides,
                                  int64_t lanes, float* stage, float* to, int64_t stride) {
  constexpr int64_t kShared = Size - kTile;  // with the next tile
  int64_t sizes[2];
  for (size_t i = 0; i < 2; ++i) {
    const int64_t first = segment.first[i] * kTile;
    sizes[i] = std::min(segment.size[i] * kTile, plan.shape.places[i + 1] - first) + kShared;
    data += first * strides[i + 3];
  }
  const int64_t tiles = segment.size[1], pitch = sizes[1] * Lanes;
  for (int64_t first = 0; first < lanes; first += Lanes, to += plan.panel) {
    const float* const panel = data + first * strides[1];
    Source box{panel,
               std::min<int64_t>(Lanes, lanes - first),
               strides[1],
               {1, 0, sizes[1]},
               {0, strides[3], strides[4]}};
    int64_t packed = 0;
    for (int64_t i = 0; i < segment.size[0]; ++i) {
      const int64_t begin = i * kTile, end = std::min(begin + Size, sizes[0]);
      if (i > 0) {
        std::memcpy(stage, stage + kTile * pitch,
                    static_cast<size_t>(kShared * pitch) * sizeof(float));
      }
      box.data = panel + packed * strides[3];
      box.size[1] = end - packed;
      pack<Lanes>(box, stage + (packed - begin) * pitch, 0);
      packed = end;
      transform_row<Lanes, Size>(stage, end - begin, sizes[1], tiles, to + i * tiles * Lanes,
                                 stride);
    }
  }
}

// The 36 products of a block with `vectors` of inputs and `rows` of gradients.
template <int Lanes>
FITCOMPRESS_INLINE void multiply_block(const WinogradPlan& plan, const float* inputs,
                                       int64_t vectors, const float* grads, int64_t rows,
                                       int64_t tiles, bool add, float* products) {
  for (int p = 0; p < kPoints; ++p) {
    for (int64_t v = 0, now; v < vectors; v += now) {
      const int64_t left = vectors - v;
      now = std::min<int64_t>(kGramVectors<Lanes>, left == 4 ? 2 : left);
      const float* const x = inputs + v * plan.panel;
      for (int64_t r = 0; r < rows; r += kGramRows<Lanes>) {
        constexpr int kRows = kGramRows<Lanes>;
        const float* const e = grads + r / Lanes * plan.panel + r % Lanes;
        float* const to = products + r * plan.columns + v * Lanes;
        if (now == 3) {
          multiply_tile<Lanes, kRows, kGramVectors<Lanes>>(e, x, plan.panel, tiles, add, to,
                                                           plan.columns);
        } else if (now == 2) {
          multiply_tile<Lanes, kRows, 2>(e, x, plan.panel, tiles, add, to, plan.columns);
        } else {
          multiply_tile<Lanes, kRows, 1>(e, x, plan.panel, tiles, add, to, plan.columns);
        }
      }
    }
    inputs += plan.input_stride;
    grads += plan.grad_stride;
    products += plan.product_stride;
  }
}

// The sum of squares of a block's gradients; lanes beyond the last channel do not count.
template <int Lanes>
FITCOMPRESS_INLINE double square_block(const WinogradPlan& plan, const float* products,
                                       int64_t rows, int64_t channels) {
  double total[Lanes] = {};
  for (int64_t c = 0; c < channels; c += Lanes) {
    typename VectorOf<Lanes>::Type sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      add_squares<Lanes>(products + r * plan.columns + c, plan.product_stride, &sum);
    }
    for (int64_t l = 0; l < std::min<int64_t>(Lanes, channels - c); ++l) total[l] += sum[l];
  }
  double norm = 0.0;
  for (int l = 0; l < Lanes; ++l) norm += total[l];
  return norm;
}

// What a task adds to ‖G_b‖², times 1 / kNormScale.
template <int Lanes>
FITCOMPRESS_INLINE double norm_of_task(const WinogradPlan& plan, const float* output_grad,
                                       const float* input, int64_t task,
                                       const WinogradScratch& scratch) {
  const WeightGradShape& s = plan.shape;
  const int64_t first_image = task / plan.output_splits * s.images;
  const int64_t first_output = task % plan.output_splits * plan.outputs;
  const int64_t outputs = std::min(plan.outputs, s.outputs - first_output);
  double norm = 0.0;
  for (int64_t i = 0; i < plan.segments; ++i) {
    const WinogradSegment segment = plan.segment(i);
    const int64_t image = first_image + segment.image;
    const float* const grads =
        output_grad + image * s.grad_strides[0] + first_output * s.grad_strides[1];
    transform<Lanes, kTile>(plan, segment, grads, s.grad_strides, outputs, scratch.stage.get(),
                            scratch.grads.get(), plan.grad_stride);
    float* products = scratch.products.get();
    for (int64_t c = 0; c < s.channels; c += plan.columns) {
      const int64_t columns = std::min(plan.columns, s.channels - c);
      transform<Lanes, kWindow>(
          plan, segment, input + image * s.input_strides[0] + c * s.input_strides[1],
          s.input_strides, columns, scratch.stage.get(), scratch.inputs.get(), plan.input_stride);
      for (int64_t r = 0; r < outputs; r += plan.rows) {
        const int64_t rows = std::min(plan.rows, outputs - r);
        multiply_block<Lanes>(plan, scratch.inputs.get(), ceil_div(columns, Lanes),
                              scratch.grads.get() + r / Lanes * plan.panel, rows, segment.tiles(),
                              i > 0, products);
        if (i + 1 == plan.segments) norm += square_block<Lanes>(plan, products, rows, columns);
        if (plan.kept_blocks > 1) products += plan.block_size;
      }
    }
  }
  return norm;
}

}  // namespace

void winograd_norms_cpu(const WeightGradShape& shape, const float* output_grad, const float* input,
                        double scale, double* norms) {
  if (shape.samples * shape.positions() * shape.outputs * shape.channels == 0) return;
  int64_t width = 0;
  dispatch_isa([&](auto lanes) { width = lanes; });
  const WinogradPlan plan(shape, width);
  std::vector<double> parts(static_cast<size_t>(plan.tasks));
  std::atomic<int64_t> next{0};  // each thread takes one task after the other
  parallel_for(plan.tasks, 1, [&](int64_t, int64_t) {
    try {
      const WinogradScratch scratch(plan);
      dispatch_isa([&](auto lanes) __attribute__((always_inline)) {
        for (int64_t task = next++; task < plan.tasks; task = next++) {
          parts[static_cast<size_t>(task)] =
              norm_of_task<lanes>(plan, output_grad, input, task, scratch);
        }
      });
    } catch (const std::bad_alloc&) {
      // The others do the work.
    }
  });
  if (next < plan.tasks) throw std::bad_alloc();
  for (int64_t b = 0; b < shape.samples; ++b) {
    double norm = 0.0;
    for (int64_t i = 0; i < plan.output_splits; ++i) {
      norm += parts[static_cast<size_t>(b * plan.output_splits + i)];
    }
    norms[b] += scale * (kNormScale * norm);
  }
}

}  // namespace fitcompress
