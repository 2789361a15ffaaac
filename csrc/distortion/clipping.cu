// The choice of clips on CUDA.
//
// A warp owns a piece of a scale unit's weights and sums the errors of one candidate after the
// other over it, in float64 and a fixed order; a thread a unit then adds up the pieces in order and
// takes the least. Bound: one division and about ten instructions a weight and candidate.
#include <algorithm>

#include "distortion/device_layer.cuh"

namespace fitcompress {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kClipPiece = 2048;           // weights of a warp
constexpr int64_t kErrors = int64_t{1} << 21;  // that are held at a time
constexpr int kWarps = kLayerThreads / kWarp;

struct Candidates {
  int64_t count;
  const float* clip;
  float largest;
};

// errors: [units, pieces, candidates], of the units from first_unit on.
template <class T>
__global__ void errors_kernel(DeviceLayer<T> layer, Candidates candidates, int64_t first_unit,
                              int64_t units, int64_t pieces, double* errors) {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (warp >= units * pieces) return;
  const int64_t unit = first_unit + warp / pieces;
  int64_t begin = 0, end = layer.count();
  if (layer.width > 0) {
    const int64_t a_row = layer.units_a_row();
    begin = unit / a_row * layer.cols + unit % a_row * layer.width;
    end = min(begin + layer.width, (unit / a_row + 1) * layer.cols);
  }
  begin += warp % pieces * kClipPiece;
  end = min(end, begin + kClipPiece);
  const float range = layer.range[unit];
  const double inverse = range > 0.0f ? 1.0 / double{range} : 0.0;
  for (int64_t c = 0; c < candidates.count; ++c) {
    const double clip = candidates.clip[c];
    const auto gain = static_cast<float>(candidates.largest / clip);
    const double spacing = clip / candidates.largest;
    double sum = 0.0;
    for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kWarp) {
      const float magnitude = fabsf(to_float(layer.weight[i]));
      const float x = range > 0.0f ? magnitude / range : 0.0f;
      const float code = fminf(rintf(x * gain), candidates.largest);
      const double error = double{magnitude} * inverse - double{code} * spacing;
      sum += (layer.fisher == nullptr ? 1.0 : double{layer.fisher[i]}) * (error * error);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) errors[warp * candidates.count + c] = sum;
  }
}

__global__ void choose_kernel(Candidates candidates, int64_t units, int64_t pieces,
                              const double* errors, float* clip) {
  const int64_t unit = blockIdx.x * static_cast<int64_t>(kLayerThreads) + threadIdx.x;
  if (unit >= units) return;
  double least = INFINITY;
  float best = candidates.clip[0];
  for (int64_t c = 0; c < candidates.count; ++c) {
    double sum = 0.0;
    for (int64_t p = 0; p < pieces; ++p) {
      sum += errors[(unit * pieces + p) * candidates.count + c];
    }
    if (sum < least) {
      least = sum;
      best = candidates.clip[c];
    }
  }
  clip[unit] = best;
}

}  // namespace

template <class T>
void choose_clips_on_device(const DeviceLayer<T>& layer, float largest,
                            const std::vector<float>& candidates, float* clip,
                            const DeviceQueue& queue) {
  const Candidates of_grid{static_cast<int64_t>(candidates.size()), queue.upload(candidates),
                           largest};
  const int64_t size = layer.width == 0 ? layer.count() : std::min(layer.width, layer.cols);
  // Nothing to sum up where there is no choice.
  const int64_t pieces = of_grid.count == 1 ? 0 : divide_up(size, kClipPiece);
  const int64_t a_unit = std::max<int64_t>(1, pieces * of_grid.count);
  const int64_t batch = std::clamp<int64_t>(kErrors / a_unit, 1, layer.units());
  auto* const errors = allocate<double>(*queue.scratch, batch * a_unit);
  for (int64_t first = 0; first < layer.units(); first += batch) {
    const int64_t units = std::min(batch, layer.units() - first);
    if (pieces > 0) {
      errors_kernel<<<grid_size(divide_up(units * pieces, kWarps)), kLayerThreads, 0,
                      stream_of(queue)>>>(layer, of_grid, first, units, pieces, errors);
    }
    choose_kernel<<<grid_size(divide_up(units, kLayerThreads)), kLayerThreads, 0,
                    stream_of(queue)>>>(of_grid, units, pieces, errors, clip + first);
  }
  check_cuda(cudaGetLastError(), "distortion_table");
}

#define FITCOMPRESS_CLIPS(T)                                                                       \
  template void choose_clips_on_device<T>(const DeviceLayer<T>&, float, const std::vector<float>&, \
                                          float*, const DeviceQueue&);
FITCOMPRESS_CLIPS(float)
FITCOMPRESS_CLIPS(BFloat16)
FITCOMPRESS_CLIPS(Float16)

}  // namespace fitcompress
