// Beam search over the codes of each row on CUDA, in float64.
//
// A block owns a row at a time. For each column, a thread makes the proposals of a path; every
// thread ranks its share of them by counting the cheaper ones; then all threads write the new
// paths' later columns from their parents', in a second copy of them. Products and differences are
// rounded one by one (no fused multiply-add in this file), so codes have the same bits as on the
// CPU. Bound: B·N²/2 elements a row read and written once each, and 3N synchronisations.
#include <algorithm>

#include "common/cuda.h"
#include "compensate/beam_sweep.h"

namespace fitcompress {
namespace {

constexpr int kThreads = 256;
constexpr int kMostChoices = 4;
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kMostDoubles = int64_t{1} << 27;  // of all blocks' later columns: 1 GiB
constexpr double kCodeLimit = 2147483647.0;
constexpr double kCostLimit = 1.7976931348623157e308;

// Of all blocks; P = kMostChoices · B proposals.
struct Memory {
  double* later;           // [2][B][N]
  double* path_cost;       // [B]
  double* cost;            // [P], infinity for proposals that are left out
  double* error;           // [P]
  int32_t* proposed;       // [P]
  int32_t* order;          // [B]
  int32_t *parent, *code;  // [N][B]
};

struct Inputs {
  const double* weight;
  const double* factor;
  const double* scale;
  const uint8_t* mask;
};

// Puts the codes that a path proposes into `code`, infinity for those left out. Returns false if
// the nearest is out of range.
__device__ bool propose(double position, double max_code, double code[kMostChoices]) {
  double near = rint(position) + 0.0;
  near = near < -max_code ? -max_code : near;
  near = near > max_code ? max_code : near;
  const bool fits = near >= -kCodeLimit && near <= kCodeLimit;
  near = fits ? near : 0.0;
  const double most = max_code < kCodeLimit ? max_code : kCodeLimit;
  const double other = position > near ? near + 1.0 : near - 1.0;
  const double inner = near > 0.0 ? near - 1.0 : near + 1.0;
  const double left_out = INFINITY;
  code[0] = near;
  code[1] = other >= -most && other <= most ? other : left_out;
  code[2] = near != 0.0 && inner != other ? inner : left_out;
  code[3] = near != 0.0 && inner != 0.0 ? 0.0 : left_out;
  return fits;
}

__global__ void beam_kernel(BeamSweep sweep, Inputs in, Memory all, int32_t* codes, int32_t* bad) {
  __shared__ int survivors;
  const int64_t cols = sweep.shape.cols, beam = sweep.beam, block = blockIdx.x;
  double* const path_cost = all.path_cost + block * beam;
  double* const cost = all.cost + block * kMostChoices * beam;
  double* const error = all.error + block * kMostChoices * beam;
  int32_t* const proposed = all.proposed + block * kMostChoices * beam;
  int32_t* const order = all.order + block * beam;
  int32_t* const parent = all.parent + block * cols * beam;
  int32_t* const code = all.code + block * cols * beam;

  for (int64_t row = block; row < sweep.shape.rows; row += gridDim.x) {
    const double step = in.scale[sweep.shape.scale_per_row ? row : 0];
    const double price = sweep.rate * step * step;
    const double* from = in.weight + row * cols;
    double* to = all.later + block * 2 * beam * cols;
    double* other_to = to + beam * cols;
    int paths = 1;
    if (threadIdx.x == 0) path_cost[0] = 0.0;
    __syncthreads();
    for (int64_t j = 0; j < cols; ++j) {
      const double* const u = in.factor + j * cols;
      const bool free = step > 0.0 && (in.mask == nullptr || in.mask[row * cols + j] != 0);
      const int choices = !free ? 1 : sweep.rate > 0.0 ? kMostChoices : 2;
      if (threadIdx.x == 0) survivors = 0;
      for (int p = static_cast<int>(threadIdx.x); p < paths; p += kThreads) {
        const double w = from[p * cols + j];
        double k[kMostChoices] = {0.0};
        if (free && !propose(w / step, sweep.shape.max_code, k)) *bad = 1;
        for (int c = 0; c < choices; ++c) {
          const int i = p * choices + c;
          cost[i] = INFINITY;
          if (k[c] == INFINITY) continue;
          proposed[i] = static_cast<int32_t>(k[c]);
          error[i] = (w - k[c] * step) / u[j];
          double added = error[i] * error[i];
          if (sweep.rate > 0.0) added += price * sweep.bits[proposed[i]];
          const double total = path_cost[p] + added;
          if (total >= -kCostLimit && total <= kCostLimit) {
            cost[i] = total;
          } else {
            *bad = 1;
          }
        }
      }
      __syncthreads();
      const int count = paths * choices;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const double mine = cost[i];
        if (mine == INFINITY) continue;
        int64_t rank = 0;
        for (int o = 0; o < count; ++o) rank += cost[o] < mine || (cost[o] == mine && o < i);
        if (rank < beam) {
          order[rank] = i;
          atomicAdd(&survivors, 1);
        }
      }
      __syncthreads();
      paths = survivors;
      for (int s = static_cast<int>(threadIdx.x); s < paths; s += kThreads) {
        parent[j * beam + s] = order[s] / choices;
        code[j * beam + s] = proposed[order[s]];
        path_cost[s] = cost[order[s]];
      }
      for (int s = 0; s < paths; ++s) {
        const double e = error[order[s]];
        const double* const old = from + order[s] / choices * cols;
        for (int64_t c = j + 1 + threadIdx.x; c < cols; c += kThreads) {
          to[s * cols + c] = old[c] - e * u[c];
        }
      }
      from = to;
      to = other_to;
      other_to = const_cast<double*>(from);
      __syncthreads();        // all have read `survivors`, and the paths are final
      if (paths == 0) break;  // after a bad value
    }
    if (threadIdx.x == 0 && paths > 0) {
      int32_t slot = 0;
      for (int64_t j = cols; j-- > 0;) {
        codes[row * cols + j] = code[j * beam + slot];
        slot = parent[j * beam + slot];
      }
    }
    __syncthreads();  // the notes have been read
  }
}

}  // namespace

bool beam_sweep_cuda(const BeamSweep& sweep, const double* weight, const double* factor,
                     const double* scale, const uint8_t* mask, int32_t* codes, int device,
                     void* stream, const Scratch& scratch) {
  const int64_t rows = sweep.shape.rows, cols = sweep.shape.cols, beam = sweep.beam;
  if (rows == 0 || cols == 0) return true;
  const DeviceGuard guard(device);
  auto* const queue = static_cast<cudaStream_t>(stream);
  const int64_t room = std::max<int64_t>(1, kMostDoubles / (2 * beam * cols));
  const int64_t blocks = std::min({rows, kMostBlocks, room});
  const int64_t proposals = blocks * kMostChoices * beam;
  Memory memory{};
  memory.later = allocate<double>(scratch, blocks * 2 * beam * cols);
  memory.path_cost = allocate<double>(scratch, blocks * beam);
  memory.cost = allocate<double>(scratch, proposals);
  memory.error = allocate<double>(scratch, proposals);
  memory.proposed = allocate<int32_t>(scratch, proposals);
  memory.order = allocate<int32_t>(scratch, blocks * beam);
  memory.parent = allocate<int32_t>(scratch, blocks * cols * beam);
  memory.code = allocate<int32_t>(scratch, blocks * cols * beam);
  int32_t* const bad = allocate<int32_t>(scratch, 1);
  check_cuda(cudaMemsetAsync(bad, 0, sizeof(*bad), queue), "error_feedback_sweep");
  const Inputs inputs{weight, factor, scale, mask};
  beam_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(sweep, inputs, memory, codes,
                                                                     bad);
  check_cuda(cudaGetLastError(), "error_feedback_sweep");
  int32_t any_bad = 0;
  check_cuda(cudaMemcpyAsync(&any_bad, bad, sizeof(any_bad), cudaMemcpyDeviceToHost, queue),
             "error_feedback_sweep");
  check_cuda(cudaStreamSynchronize(queue), "error_feedback_sweep");
  return any_bad == 0;
}

}  // namespace fitcompress
