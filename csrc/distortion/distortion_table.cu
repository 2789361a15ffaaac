// Distortion table on CUDA, from an order of the weights by importance.
//
// Masks are nested, so S sparsities cut the order into S + 1 runs, the classes (see the CPU file).
// For each grid, the classes go through the device from the last to the first: a block sums one
// piece of a class, at most kPiece weights, in a fixed order, and counts its codes; after each
// class one kernel turns the histogram so far into nnz and entropy. Sums of pieces come back to the
// host, which adds them up and fills the cells. Integer counts are the only atomics, so results are
// the same from run to run; they differ from the CPU's by the order of the sums. Bound: a gather of
// the weights a grid (the order is not that of memory), and G·S pairs of launches.
#include <cmath>
#include <limits>
#include <sstream>
#include <vector>

#include "common/cuda.h"
#include "common/dtype.h"
#include "distortion/distortion_table.h"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 4096;
constexpr int kEntropyBlocks = 64;
constexpr int64_t kSharedCodes = 2048;  // histograms up to this size are counted in shared memory
constexpr int kSums = 3;                // of a piece: error, norm, distance to the next grid
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr auto kNowhere = std::numeric_limits<unsigned long long>::max();

// What the first kernel finds: where the first bad value of each kind is, and the largest weight.
struct Findings {
  unsigned long long weight, importance, fisher;
  unsigned int max;
};

struct Quantizer {  // as on the CPU: Δ = row_max / divisor + step, one of the terms being 0
  float divisor, step, max_code;
  explicit Quantizer(const Grid& grid)
      : divisor(grid.bits > 0 ? static_cast<float>((int64_t{1} << (grid.bits - 1)) - 1) : INFINITY),
        step(static_cast<float>(grid.step)),
        max_code(grid.bits > 0 ? divisor : INFINITY) {}
  __device__ float delta(float row_max) const { return row_max / divisor + step; }
  __device__ float code(float weight, float delta) const {
    if (!(delta > 0.0f)) return 0.0f;
    float code = rintf(weight / delta) + 0.0f;
    code = code < -max_code ? -max_code : code;
    return code > max_code ? max_code : code;
  }
};

// The layer on the device; row_max is scratch.
template <class T>
struct Layer {
  int64_t rows, cols;
  const T* weight;
  const float* fisher;
  const float* importance;
  const int64_t* order;
  float* row_max;
};

template <class T>
__global__ void inspect_kernel(Layer<T> layer, Findings* findings) {
  __shared__ unsigned int max;
  if (threadIdx.x == 0) max = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * layer.cols;
  for (int64_t i = begin + threadIdx.x; i < begin + layer.cols; i += kThreads) {
    const unsigned int pattern = bits_of_float(to_float(layer.weight[i])) & 0x7fffffffu;
    atomicMax(&max, pattern);
    const auto at = static_cast<unsigned long long>(i);
    if (pattern >= kInfinity) atomicMin(&findings->weight, at);
    if (!(layer.importance[i] >= 0.0f)) atomicMin(&findings->importance, at);
    if (layer.fisher != nullptr && !(layer.fisher[i] >= 0.0f && layer.fisher[i] < INFINITY)) {
      atomicMin(&findings->fisher, at);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    layer.row_max[blockIdx.x] = float_of_bits(max);
    atomicMax(&findings->max, max);
  }
}

// Sums and codes of the weights order[begin .. end), one piece a block.
template <class T>
__global__ void class_kernel(Layer<T> layer, Quantizer grid, Quantizer next, int64_t begin,
                             int64_t end, int64_t largest_code, unsigned long long* histogram,
                             double* sums) {
  __shared__ unsigned int shared[kSharedCodes];
  const int64_t codes = 2 * largest_code + 1;
  const bool in_shared = codes <= kSharedCodes;
  for (int64_t i = threadIdx.x; in_shared && i < codes; i += kThreads) shared[i] = 0;
  __syncthreads();
  double error = 0.0, norm = 0.0, to_next = 0.0;
  const int64_t first = begin + blockIdx.x * kPiece;
  const int64_t last = min(first + kPiece, end);
  for (int64_t place = first + threadIdx.x; place < last; place += kThreads) {
    const int64_t i = layer.order[place];
    const float w = to_float(layer.weight[i]);
    const float f = layer.fisher == nullptr ? 1.0f : layer.fisher[i];
    const float row_max = layer.row_max[i / layer.cols];
    const float delta = grid.delta(row_max);
    const float code = grid.code(w, delta);
    const float value = code * delta;
    const float next_delta = next.delta(row_max);
    const float step = value - next.code(w, next_delta) * next_delta;
    error += f * ((w - value) * (w - value));
    norm += f * (value * value);
    to_next += f * (step * step);
    const int64_t bin = static_cast<int64_t>(code) + largest_code;
    if (in_shared) {
      atomicAdd(&shared[bin], 1u);
    } else {
      atomicAdd(&histogram[bin], 1ull);
    }
  }
  const double totals[kSums] = {block_sum<kThreads>(error), block_sum<kThreads>(norm),
                                block_sum<kThreads>(to_next)};
  if (threadIdx.x == 0) {
    for (int k = 0; k < kSums; ++k) sums[blockIdx.x * kSums + k] = totals[k];
  }
  for (int64_t i = threadIdx.x; in_shared && i < codes; i += kThreads) {
    if (shared[i] != 0) atomicAdd(&histogram[i], static_cast<unsigned long long>(shared[i]));
  }
}

// Σ F θ² of the same weights: what pruning them costs.
template <class T>
__global__ void prune_kernel(Layer<T> layer, int64_t begin, int64_t end, double* sums) {
  double sum = 0.0;
  const int64_t first = begin + blockIdx.x * kPiece;
  const int64_t last = min(first + kPiece, end);
  for (int64_t place = first + threadIdx.x; place < last; place += kThreads) {
    const int64_t i = layer.order[place];
    const float w = to_float(layer.weight[i]);
    sum += (layer.fisher == nullptr ? 1.0f : layer.fisher[i]) * (w * w);
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Per block: Σ c log c over the counts c of non-zero codes, and Σ c.
__global__ void entropy_kernel(const unsigned long long* histogram, int64_t largest_code,
                               double* result) {
  double total = 0.0;
  unsigned long long nonzero = 0;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < 2 * largest_code + 1;
       i += kEntropyBlocks * kThreads) {
    const unsigned long long count = histogram[i];
    if (count == 0 || i == largest_code) continue;
    nonzero += count;
    total += static_cast<double>(count) * log2(static_cast<double>(count));
  }
  total = block_sum<kThreads>(total);
  nonzero = block_sum<kThreads>(nonzero);
  if (threadIdx.x == 0) {
    result[2 * blockIdx.x] = total;
    result[2 * blockIdx.x + 1] = static_cast<double>(nonzero);
  }
}

void copy_to_host(void* to, const void* from, size_t bytes, cudaStream_t queue) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, queue), "distortion_table");
  check_cuda(cudaStreamSynchronize(queue), "distortion_table");
}

// The message for the first bad value, fetched from the device; empty if there is none.
template <class T>
std::string describe(const Layer<T>& layer, const Findings& findings, cudaStream_t queue) {
  std::ostringstream text;
  unsigned long long at = 0;
  const auto say = [&](const char* what, unsigned long long where, const auto* values) {
    std::remove_const_t<std::remove_pointer_t<decltype(values)>> value;
    copy_to_host(&value, values + where, sizeof(value), queue);
    text << what << to_float(value);
    at = where;
  };
  if (findings.weight != kNowhere) {
    say("weight must be finite, got ", findings.weight, layer.weight);
  } else if (findings.importance != kNowhere) {
    say("importance must be at least 0, got ", findings.importance, layer.importance);
  } else if (findings.fisher != kNowhere) {
    say("fisher must be finite and at least 0, got ", findings.fisher, layer.fisher);
  } else {
    return {};
  }
  text << " at row " << at / layer.cols << ", column " << at % layer.cols;
  return text.str();
}

// Copies a table of the host into one of the results and waits, since the vector will be freed.
template <class T>
void copy_to_result(T* to, const std::vector<T>& from, cudaStream_t queue) {
  check_cuda(
      cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, queue),
      "distortion_table");
  check_cuda(cudaStreamSynchronize(queue), "distortion_table");
}

// The classes of the order, their pieces, and what the kernels leave for the host.
struct Run {
  int64_t count;
  std::vector<int64_t> begin;        // class k is order[begin[k] .. begin[k + 1])
  std::vector<int64_t> first_piece;  // and has the pieces first_piece[k] .. first_piece[k + 1]
  std::vector<double> pruned, sums, entropies;

  size_t classes() const { return begin.size() - 1; }
  double add(const std::vector<double>& values, size_t k, int64_t stride, int64_t offset) const {
    double sum = 0.0;
    for (int64_t p = first_piece[k]; p < first_piece[k + 1]; ++p) {
      sum += values[static_cast<size_t>(p * stride + offset)];
    }
    return sum;
  }
};

Run cut_into_classes(const DistortionShape& shape) {
  Run run;
  run.count = shape.rows * shape.cols;
  run.begin = {0};
  run.begin.insert(run.begin.end(), shape.dropped.begin(), shape.dropped.end());
  run.begin.push_back(run.count);
  run.first_piece = {0};
  for (size_t k = 0; k < run.classes(); ++k) {
    const int64_t pieces = (run.begin[k + 1] - run.begin[k] + kPiece - 1) / kPiece;
    run.first_piece.push_back(run.first_piece.back() + pieces);
  }
  return run;
}

// Runs the kernels of one grid and fetches their sums.
template <class T>
void run_grid(const Layer<T>& layer, const Grid& grid, const Grid& next, int64_t largest_code,
              unsigned long long* histogram, double* sums, double* entropies, cudaStream_t queue,
              Run* run) {
  check_cuda(cudaMemsetAsync(histogram, 0, sizeof(*histogram) * (2 * largest_code + 1), queue),
             "distortion_table");
  for (size_t k = run->classes(); k-- > 0;) {
    const auto pieces = static_cast<unsigned>(run->first_piece[k + 1] - run->first_piece[k]);
    if (pieces > 0) {
      class_kernel<<<pieces, kThreads, 0, queue>>>(layer, Quantizer(grid), Quantizer(next),
                                                   run->begin[k], run->begin[k + 1], largest_code,
                                                   histogram, sums + run->first_piece[k] * kSums);
    }
    entropy_kernel<<<kEntropyBlocks, kThreads, 0, queue>>>(histogram, largest_code,
                                                           entropies + k * 2 * kEntropyBlocks);
  }
  check_cuda(cudaGetLastError(), "distortion_table");
  run->sums.resize(static_cast<size_t>(run->first_piece.back() * kSums));
  run->entropies.resize(run->classes() * 2 * kEntropyBlocks);
  copy_to_host(run->sums.data(), sums, run->sums.size() * sizeof(double), queue);
  copy_to_host(run->entropies.data(), entropies, run->entropies.size() * sizeof(double), queue);
}

// The tables on the host, filled grid by grid.
struct HostTable {
  std::vector<double> distortion, entropy_bits, grid_length, prune_length, norm;
  std::vector<int64_t> nnz;
  explicit HostTable(size_t cells)
      : distortion(cells),
        entropy_bits(cells),
        grid_length(cells),
        prune_length(cells),
        norm(cells),
        nnz(cells) {}
};

// Entropy and nnz after class k: n·H = n log n − Σ c log c, zeros being all other weights.
void fill_entropy(const Run& run, size_t k, size_t cell, HostTable* table) {
  double total = 0.0, nonzero = 0.0;
  for (size_t b = 0; b < kEntropyBlocks; ++b) {
    total += run.entropies[(k * kEntropyBlocks + b) * 2];
    nonzero += run.entropies[(k * kEntropyBlocks + b) * 2 + 1];
  }
  const auto term = [](double c) { return c > 1.0 ? c * std::log2(c) : 0.0; };
  const auto count = static_cast<double>(run.count);
  table->nnz[cell] = static_cast<int64_t>(nonzero);
  table->entropy_bits[cell] = std::max(0.0, term(count) - total - term(count - nonzero));
}

void fill_cells(const Run& run, size_t grid, HostTable* table) {
  const size_t sparsities = run.classes() - 1;
  double pruned = 0.0, error = 0.0, norm = 0.0, to_next = 0.0;
  for (size_t s = 0; s < sparsities; ++s) {
    pruned += run.add(run.pruned, s, 1, 0);
    table->distortion[grid * sparsities + s] = 0.5 * pruned;
  }
  for (size_t s = sparsities; s-- > 0;) {
    const size_t cell = grid * sparsities + s;
    const double kept_norm = run.add(run.sums, s + 1, kSums, 1);
    error += run.add(run.sums, s + 1, kSums, 0);
    norm += kept_norm;
    to_next += run.add(run.sums, s + 1, kSums, 2);
    table->distortion[cell] += 0.5 * error;
    table->norm[cell] = norm;
    table->grid_length[cell] = to_next;
    table->prune_length[cell] = s + 1 == sparsities ? 0.0 : kept_norm;
    fill_entropy(run, s + 1, cell, table);
  }
}

template <class T>
Findings inspect(const Layer<T>& layer, const Scratch& scratch, cudaStream_t queue) {
  Findings findings{kNowhere, kNowhere, kNowhere, 0};
  if (layer.rows == 0) return findings;
  Findings* const found = allocate<Findings>(scratch, 1);
  check_cuda(cudaMemcpyAsync(found, &findings, sizeof(findings), cudaMemcpyHostToDevice, queue),
             "distortion_table");
  inspect_kernel<<<static_cast<unsigned>(layer.rows), kThreads, 0, queue>>>(layer, found);
  check_cuda(cudaGetLastError(), "distortion_table");
  copy_to_host(&findings, found, sizeof(findings), queue);
  return findings;
}

}  // namespace

template <class T>
std::string distortion_table_cuda(const DistortionShape& shape, const T* weight,
                                  const float* fisher, const float* importance,
                                  const int64_t* order, const DistortionTable& table, int device,
                                  void* stream, const Scratch& scratch) {
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const Layer<T> layer{shape.rows,
                       shape.cols,
                       weight,
                       fisher,
                       importance,
                       order,
                       allocate<float>(scratch, shape.rows)};
  const Findings findings = inspect(layer, scratch, queue);
  const std::string problem = describe(layer, findings, queue);
  if (!problem.empty()) return problem;

  int64_t largest = 0;
  std::vector<int64_t> largest_codes;
  for (const Grid& grid : shape.grids) {
    const double code = largest_code(grid, float_of_bits(findings.max));
    if (code > kLargestCode) return step_too_small(grid, float_of_bits(findings.max));
    largest_codes.push_back(static_cast<int64_t>(code));
    largest = std::max(largest, largest_codes.back());
  }

  Run run = cut_into_classes(shape);
  auto* const histogram = allocate<unsigned long long>(scratch, 2 * largest + 1);
  auto* const sums = allocate<double>(scratch, run.first_piece.back() * kSums);
  auto* const entropies =
      allocate<double>(scratch, static_cast<int64_t>(run.classes()) * 2 * kEntropyBlocks);
  for (size_t k = 0; k < run.classes(); ++k) {
    const auto pieces = static_cast<unsigned>(run.first_piece[k + 1] - run.first_piece[k]);
    if (pieces == 0) continue;
    prune_kernel<<<pieces, kThreads, 0, queue>>>(layer, run.begin[k], run.begin[k + 1],
                                                 sums + run.first_piece[k]);
  }
  check_cuda(cudaGetLastError(), "distortion_table");
  run.pruned.resize(static_cast<size_t>(run.first_piece.back()));
  copy_to_host(run.pruned.data(), sums, run.pruned.size() * sizeof(double), queue);

  const size_t grids = shape.grids.size();
  HostTable host(grids * shape.dropped.size());
  for (size_t g = 0; g < grids; ++g) {
    const Grid& next = shape.grids[std::min(g + 1, grids - 1)];
    run_grid(layer, shape.grids[g], next, largest_codes[g], histogram, sums, entropies, queue,
             &run);
    fill_cells(run, g, &host);
  }
  copy_to_result(table.distortion, host.distortion, queue);
  copy_to_result(table.nnz, host.nnz, queue);
  copy_to_result(table.entropy_bits, host.entropy_bits, queue);
  copy_to_result(table.grid_length, host.grid_length, queue);
  copy_to_result(table.prune_length, host.prune_length, queue);
  copy_to_result(table.norm, host.norm, queue);
  return {};
}

template std::string distortion_table_cuda<float>(const DistortionShape&, const float*,
                                                  const float*, const float*, const int64_t*,
                                                  const DistortionTable&, int, void*,
                                                  const Scratch&);
template std::string distortion_table_cuda<BFloat16>(const DistortionShape&, const BFloat16*,
                                                     const float*, const float*, const int64_t*,
                                                     const DistortionTable&, int, void*,
                                                     const Scratch&);
template std::string distortion_table_cuda<Float16>(const DistortionShape&, const Float16*,
                                                    const float*, const float*, const int64_t*,
                                                    const DistortionTable&, int, void*,
                                                    const Scratch&);

}  // namespace fitcompress
