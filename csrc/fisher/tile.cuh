// Products of tiles on CUDA, for every Fisher kernel: sum += left · right over `depth` terms.
//
// An operand is a set of positions with columns (outputs, or inputs of the weight) that are
// contiguous in pieces of 16 bytes. Asynchronous copies bring tiles of positions × columns into
// shared memory, several steps ahead. The sum runs over positions (Transposed: tiles are
// [depth][side]) or over columns (tiles are [side][depth]).
//
// A thread owns 8 × 8 elements of the block's tile in registers. float32: ordinary multiply-adds,
// never tensor cores, which would round the factors. 16-bit types: tensor cores, sums in float32.
#pragma once

#include "common/tensor_cores.cuh"
#include "fisher/operand.cuh"

namespace fitcompress {

constexpr int kSide = 8;    // elements of a thread along each side
constexpr int kStages = 4;  // tiles of each operand in shared memory

// What one thread copies of a tile of Lines positions × Length columns.
template <class T, int Lines, int Length, int Threads>
class TileCopy {
 public:
  static constexpr int kStride = Length + kChunk<T>;  // of a line; no two rows share their banks
  static constexpr int kElements = Lines * kStride;

  __device__ void look_up_positions(const Operand<T>& operand, int first, int count) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = first + line(i);
      positions_[i] = position < count ? operand.positions[position] : kOutside;
    }
  }

  __device__ void look_up_columns(const Operand<T>& operand, int first) {
    const int column = first + chunk() * kChunk<T>;
    column_ = column < operand.width ? operand.columns[column / kChunk<T>] : kOutside;
  }

  // Copies zeros where nothing is, or if not wanted.
  __device__ void start(const T* data, T* tile, bool wanted) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int offset = positions_[i] + column_;
      copy_async(tile + line(i) * kStride + chunk() * kChunk<T>,
                 data + int64_t{max(offset, 0)} * kChunk<T>, wanted && offset >= 0);
    }
  }

 private:
  static constexpr int kChunks = Length / kChunk<T>;  // of a line
  static constexpr int kCopies = Lines * kChunks / Threads;
  static_assert(Threads % kChunks == 0 && Lines * kChunks % Threads == 0);

  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  __device__ static int line(int i) {
    return static_cast<int>(threadIdx.x) / kChunks + i * (Threads / kChunks);
  }

  int32_t positions_[kCopies];  // offsets in chunks
  int32_t column_;
};

// For each step calls copy(stage, wanted), ahead of its use, and use(stage, meanwhile); this must
// call meanwhile, which starts a later copy, in the shadow of its first products.
template <class Copy, class Use>
__device__ void run_pipeline(int64_t steps, Copy&& copy, Use&& use) {
  for (int step = 0; step < kStages - 1; ++step) {
    copy(step, step < steps);
    commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all see this step's tiles and have used those of the step before
    use(static_cast<int>(step % kStages), [&] {
      const int64_t next = step + kStages - 1;
      copy(static_cast<int>(next % kStages), next < steps);
      commit_copies();
    });
  }
  wait_for_copies<0>();
  __syncthreads();  // the memory is free
}

// The sizes of a block's tile and its stages.
template <class Element, int Rows, int Cols, int Threads, int Depth, bool Transposed>
struct TileShape {
  using T = Element;
  static constexpr int kRows = Rows, kCols = Cols, kThreads = Threads, kDepth = Depth;
  static constexpr int kWarps = Threads / 32;
  // On a multiprocessor: 8 warps leave each thread the registers that it needs.
  static constexpr int kBlocks = 256 / Threads;
  using Left = TileCopy<T, Transposed ? Depth : Rows, Transposed ? Rows : Depth, Threads>;
  using Right = TileCopy<T, Transposed ? Depth : Cols, Transposed ? Cols : Depth, Threads>;
  static constexpr int kBytes =
      kStages * (Left::kElements + Right::kElements) * static_cast<int>(sizeof(T));

  __device__ static T* left(T* memory, int stage) {
    return memory + stage * (Left::kElements + Right::kElements);
  }
  __device__ static T* right(T* memory, int stage) { return left(memory, stage) + Left::kElements; }
};

// float32: a thread's rows and columns are 2 runs of 4 (Transposed), or every so many-th.
template <int Cols, bool Transposed>
struct FloatTile : TileShape<float, 64, Cols, Cols, 16, Transposed> {
  __device__ static int row(int i) { return place(down(), kDown, i); }
  __device__ static int col(int j) { return place(across(), kAcross, j); }

  template <class Meanwhile>
  __device__ static void multiply(const float* left, const float* right, int depth,
                                  float (&sum)[kSide][kSide], Meanwhile&& meanwhile) {
    constexpr int kPart = Transposed ? 1 : 4;  // terms that lie side by side
    constexpr int kUnroll = 8;
#pragma unroll
    for (int first = 0; first < FloatTile::kDepth; first += kUnroll) {
      if (first > 0 && first >= depth) break;
#pragma unroll
      for (int d = 0; d < kUnroll; d += kPart) {
        float a[kSide][kPart], b[kSide][kPart];
        load<FloatTile::Left::kStride>(left, first + d, down(), kDown, a);
        load<FloatTile::Right::kStride>(right, first + d, across(), kAcross, b);
#pragma unroll
        for (int part = 0; part < kPart; ++part) {
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
#pragma unroll
            for (int j = 0; j < kSide; ++j) sum[i][j] += a[i][part] * b[j][part];
          }
        }
      }
      if (first == 0) meanwhile();
    }
  }

 private:
  static constexpr int kAcross = Cols / kSide, kDown = 8;  // threads along each side

  // Warps of 8 × 4 threads, neighbours reading the same: the memory serves each load in two parts.
  __device__ static int across() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / 32 % (kAcross / 8) * 8 + thread / 2 % 8;
  }
  __device__ static int down() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / 32 / (kAcross / 8) * 4 + thread / 16 % 2 * 2 + thread % 2;
  }
  __device__ static int place(int thread, int threads, int i) {
    return Transposed ? i / 4 * 4 * threads + thread * 4 + i % 4 : i * threads + thread;
  }

  // 16 bytes at a time.
  template <int Stride, int Part>
  __device__ static void load(const float* tile, int depth, int thread, int threads,
                              float (&to)[kSide][Part]) {
#pragma unroll
    for (int i = 0; i < kSide; i += Transposed ? 4 : 1) {
      const int side = place(thread, threads, i);
      const int at = Transposed ? depth * Stride + side : side * Stride + depth;
      const float4 values = *reinterpret_cast<const float4*>(tile + at);
      const float list[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (Transposed) {
          to[i + k][0] = list[k];
        } else {
          to[i][k] = list[k];
        }
      }
    }
  }
};

// 16-bit types: warps of 64 × 32 elements.
template <class T, int WarpRows, int WarpCols, bool Transposed>
struct TensorTile
    : TileShape<T, WarpRows * 64, WarpCols * 32, WarpRows * WarpCols * 32, 32, Transposed> {
  __device__ static int row(int i) {
    return warp() / WarpCols * 64 + i / 2 * 16 + i % 2 * 8 + lane() / 4;
  }
  __device__ static int col(int j) {
    return warp() % WarpCols * 32 + j / 2 * 8 + lane() % 4 * 2 + j % 2;
  }

  template <class Meanwhile>
  __device__ static void multiply(const T* left, const T* right, int depth,
                                  float (&sum)[kSide][kSide], Meanwhile&& meanwhile) {
    constexpr int kTerms = 16;
    const int first_row = warp() / WarpCols * 64, first_col = warp() % WarpCols * 32;
    // The lane's row in the matrices that it loads: beside or below each other.
    const int inner = lane() % 8, second = lane() / 8 % 2 * 8, third = lane() / 16 * 8;
#pragma unroll
    for (int d = 0; d < TensorTile::kDepth; d += kTerms) {
      if (d > 0 && d >= depth) break;
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int side = first_row + i * 16 + second, term = d + third;
        load_matrices<Transposed>(at<TensorTile::Left::kStride>(left, side, term, inner), a[i]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int side = first_col + j * 16 + third, term = d + second;
        load_matrices<Transposed>(at<TensorTile::Right::kStride>(right, side, term, inner), b[j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add(T(), a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], sum[2 * i][2 * j],
                       sum[2 * i][2 * j + 1], sum[2 * i + 1][2 * j], sum[2 * i + 1][2 * j + 1]);
        }
      }
      if (d == 0) meanwhile();
    }
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // Row `inner` of the matrix that begins at (side, term).
  template <int Stride>
  __device__ static const T* at(const T* tile, int side, int term, int inner) {
    return Transposed ? tile + (term + inner) * Stride + side
                      : tile + (side + inner) * Stride + term;
  }
};

}  // namespace fitcompress
