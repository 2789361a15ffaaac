// Inspection of a layer on CUDA: one read of weights, Fisher diagonal and importances.
//
// A block owns a piece of the weights. Maxima and first places are integers (bit patterns order
// like floats ≥ 0), so atomics find them; Σ F is summed a piece at a time in a fixed order, and the
// pieces on the host. Bound: one read from memory, and, where a piece has several scale units, one
// atomic maximum a weight.
#include <vector>

#include "distortion/device_layer.cuh"

namespace fitcompress {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

struct Findings {
  unsigned long long weight, given, fisher;
  unsigned int max_weight, max_fisher;
};

template <class T>
__global__ void inspect_kernel(DeviceLayer<T> layer, Findings* findings, double* sums) {
  __shared__ unsigned int max_weight, max_fisher;
  if (threadIdx.x == 0) max_weight = max_fisher = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * kLayerPiece;
  const int64_t end = min(begin + kLayerPiece, layer.count());
  auto* const range = reinterpret_cast<unsigned int*>(layer.range);  // floats ≥ 0
  const int64_t unit = unit_of(layer, begin);
  const bool one_unit = unit_of(layer, end - 1) == unit;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kLayerThreads) {
    const auto at = static_cast<unsigned long long>(i);
    const unsigned int pattern = bits_of_float(to_float(layer.weight[i])) & 0x7fffffffu;
    atomicMax(&max_weight, pattern);
    if (!one_unit) atomicMax(&range[unit_of(layer, i)], pattern);
    if (pattern >= kInfinity) atomicMin(&findings->weight, at);
    if (layer.given != nullptr && !(layer.given[i] >= 0.0f)) atomicMin(&findings->given, at);
    if (layer.fisher == nullptr) continue;
    const float f = layer.fisher[i];
    sum += f;
    if (!(f >= 0.0f && f < INFINITY)) {
      atomicMin(&findings->fisher, at);
    } else {
      atomicMax(&max_fisher, bits_of_float(f) & 0x7fffffffu);
    }
  }
  const double total = block_sum<kLayerThreads>(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = total;
    if (one_unit) atomicMax(&range[unit], max_weight);
    atomicMax(&findings->max_weight, max_weight);
    atomicMax(&findings->max_fisher, max_fisher);
  }
}

}  // namespace

DeviceScope::DeviceScope(int device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

DeviceScope::~DeviceScope() { cudaSetDevice(before_); }

void DeviceQueue::to_device(void* to, const void* from, int64_t bytes) const {
  auto* const queue = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, queue),
             "distortion_table");
  check_cuda(cudaStreamSynchronize(queue), "distortion_table");
}

void DeviceQueue::to_host(void* to, const void* from, int64_t bytes) const {
  auto* const queue = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, queue),
             "distortion_table");
  check_cuda(cudaStreamSynchronize(queue), "distortion_table");
}

template <class T>
DeviceInspection inspect_on_device(const DeviceLayer<T>& layer, const DeviceQueue& queue) {
  constexpr auto kNowhere = DeviceInspection::kNowhere;
  const auto range_bytes = static_cast<size_t>(layer.units()) * sizeof(float);
  check_cuda(cudaMemsetAsync(layer.range, 0, range_bytes, stream_of(queue)), "distortion_table");
  DeviceInspection result{kNowhere, kNowhere, kNowhere, 0.0f, 0.0f, 0.0};
  if (layer.count() == 0) return result;
  Findings* const found = queue.upload(std::vector<Findings>{{kNowhere, kNowhere, kNowhere, 0, 0}});
  const unsigned blocks = layer_blocks(layer.count());
  auto* const sums = allocate<double>(*queue.scratch, blocks);
  inspect_kernel<<<blocks, kLayerThreads, 0, stream_of(queue)>>>(layer, found, sums);
  check_cuda(cudaGetLastError(), "distortion_table");
  Findings findings;
  queue.to_host(&findings, found, sizeof(findings));
  std::vector<double> parts(blocks);
  queue.to_host(parts.data(), sums, static_cast<int64_t>(parts.size() * sizeof(double)));
  result.bad_weight = findings.weight;
  result.bad_given = findings.given;
  result.bad_fisher = findings.fisher;
  result.max_weight = float_of_bits(findings.max_weight);
  result.max_fisher = float_of_bits(findings.max_fisher);
  for (const double part : parts) result.sum_fisher += part;
  return result;
}

template DeviceInspection inspect_on_device<float>(const DeviceLayer<float>&, const DeviceQueue&);
template DeviceInspection inspect_on_device<BFloat16>(const DeviceLayer<BFloat16>&,
                                                      const DeviceQueue&);
template DeviceInspection inspect_on_device<Float16>(const DeviceLayer<Float16>&,
                                                     const DeviceQueue&);

}  // namespace fitcompress
