// The kernels of the depthwise convolution on the GPU share these definitions.
//
// The sites of a square tile are divided into squares of S x S, S a power of two: S x S consecutive rows in nested
// order. A warp takes one square at a time and a *slab* of its channels, one or two for each lane. A lane keeps the
// K x K weights of its channels and the sums of its outputs in registers. Input sites are copied to shared memory once,
// 16 bytes at a time and without passing through registers. Every value read from there serves up to K rows and K
// columns of outputs. A warp shares its slab with no other warp, so warps do not wait for each other.
//
//   S = 8, 4 (depthwise_halo.cu):    the warp gathers the square that the outputs see, (S + K - 1)^2 sites, from its
//                                    neighbours.
//   S = 2, 1 (depthwise_window.cu):  squares see many times their own size, so the warp takes several consecutive
//                                    squares and stages the run of rows that contains everything they see.
//
// A masked neighbour costs neither loads nor multiplications, because all lanes of a warp have the same neighbours.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "depthwise.h"
#include "nested.cuh"
#include "types.cuh"

namespace sparsecnx::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

// The warps for which a multiprocessor has registers: 168 for each thread in 16 bits and up to 255 in 32. The warps of
// a block that normalises rows do so together; it has at most that many.
template <class T>
constexpr int kMostWarps = sizeof(T) == 2 ? 12 : 8;

// Otherwise warps share nothing. A block is small, so that a warp that waits for its rows delays few others.
constexpr int kThreads = 128;
template <class T>
constexpr int kGradBlocks = kMostWarps<T> * kLanes / kThreads;  // of the weight gradient, on a multiprocessor

constexpr int kWindowRows = 104;  // rows of x staged at once: slabs of 128 bytes, 13 KiB

template <int S>
constexpr int kSquaresAtOnce = S == 2 ? 8 : 16;

// The squares of all tiles, which are squares themselves.
struct Squares {
  const int32_t* table;
  int count;          // rows are numbered in 31 bits, so squares are
  TileSide per_tile;  // squares per tile side
  int span;

  Squares(const DepthwiseGeometry& g, int side)
      : table(g.table),
        count(static_cast<int>(g.rows() / (side * side))),
        per_tile(g.tile[2] / side),
        span(g.span[2]) {}

  // Returns a position among the squares, at most their end.
  __device__ int at(int64_t position) const { return static_cast<int>(min(position, int64_t{count})); }

  // Returns the square dy below and dx to the right of square q, -1 if it is masked.
  __device__ int neighbour(int q, int dy, int dx) const {
    const int tile = q / per_tile.sites(), inside = q % per_tile.sites();
    const int reach = span / 2, side = per_tile.side;
    const int y = site_line(per_tile, inside) + dy + reach * side;
    const int x = site_column(per_tile, inside) + dx + reach * side;
    const int32_t there = table[int64_t{tile} * (span * span) + y / side * span + x / side];
    if (there < 0) return -1;
    return there * per_tile.sites() + nested_line(per_tile, y % side) + nested_column(per_tile, x % side);
  }
};

// A kernel of side K reaches this far from a square of side S.
template <int K, int S>
struct Reach {
  static constexpr int kHalo = S + K - 1;               // sites per side that the outputs see
  static constexpr int kSquares = (K / 2 + S - 1) / S;  // squares to each side
  static constexpr int kAcross = 2 * kSquares + 1;      // squares per side of the neighbourhood
  static constexpr int kShift = kSquares * S - K / 2;   // of the halo in the neighbourhood
  static constexpr int kAround = kAcross * kAcross;
};

// Returns the nested index of site (y, x) of a square.
template <int S>
__host__ __device__ constexpr int nested_in_square(int y, int x) {
  static_assert((S & (S - 1)) == 0 && S <= 8);
  return (y & 1) << 1 | (y & 2) << 2 | (y & 4) << 3 | (x & 1) | (x & 2) << 1 | (x & 4) << 2;
}

// Calls f(output, tap) for every output of a square, in raster order, that sees the site at (line, column), which is
// counted from the first site that the square sees.
template <int K, int S, class F>
__device__ __forceinline__ void for_outputs(int line, int column, const F& f) {
#pragma unroll
  for (int i = 0; i < S * S; ++i) {
    const int ky = line - i / S, kx = column - i % S;
    if (ky >= 0 && ky < K && kx >= 0 && kx < K) f(i, ky * K + kx);
  }
}

// Four bytes of adjacent values, which are moved at once.
template <class T, int kPer>
union alignas(4) Group {
  static_assert(kPer * sizeof(T) == 4);
  unsigned bits;
  T at[kPer];
};

// The channels that one warp works on, kPer for each lane.
template <class T, int kPer>
struct Slab {
  static constexpr int kChannels = kLanes * kPer;
  static constexpr int kPerPack = Pack<T>::kSize;
  static constexpr int kLanesPerRow = kChannels / kPerPack;  // that move a row 16 bytes each
  static constexpr int kRowsAtOnce = kLanes / kLanesPerRow;
  static_assert(kLanesPerRow <= kLanes);

  int channels;  // C
  int first;     // channel of the slab
  bool packs;    // rows of x can be moved 16 bytes at a time
  int lane;

  __device__ Slab(int channels, int index, bool packs)
      : channels(channels), first(index * kChannels), packs(packs), lane(threadIdx.x % kLanes) {}

  __device__ int channel(int j) const { return first + lane * kPer + j; }
  __device__ bool inside(int j) const { return channel(j) < channels; }
  // Returns the offset of a value of a row.
  __device__ int64_t offset(int64_t row, int part) const { return row * channels + first + part; }

  // Read and write the lane's values of a row in shared memory. `at` points to the first.
  static __device__ void read(const T* at, float (&values)[kPer]) {
    Group<T, kPer> group;
    group.bits = *reinterpret_cast<const unsigned*>(at);
#pragma unroll
    for (int j = 0; j < kPer; ++j) values[j] = widen(group.at[j]);
  }
  static __device__ void write(T* at, const float (&values)[kPer]) {
    Group<T, kPer> group;
#pragma unroll
    for (int j = 0; j < kPer; ++j) group.at[j] = narrow<T>(values[j]);
    *reinterpret_cast<unsigned*>(at) = group.bits;
  }

  // Starts to copy rows to shared memory. Place i, of kChannels values, gets row_of(i), or nothing if that is negative.
  template <class F>
  __device__ void fetch(T* to, const T* from, int count, const F& row_of) const {
    if (packs) {
      const int part = lane % kLanesPerRow * kPerPack;
      if (first + part < channels) {
#pragma unroll 4
        for (int i = lane / kLanesPerRow; i < count; i += kRowsAtOnce) {
          const int row = row_of(i);
          if (row >= 0) __pipeline_memcpy_async(to + i * kChannels + part, from + offset(row, part), 16);
        }
      }
    } else {
      const int known = min(kChannels, channels - first);
      for (int i = 0; i < count; ++i) {
        const int row = row_of(i);
        if (row < 0) continue;
        for (int part = lane; part < known; part += kLanes) to[i * kChannels + part] = from[offset(row, part)];
      }
    }
    __pipeline_commit();
  }

  // Waits until the copies of the whole warp have arrived.
  __device__ void arrive() const {
    __pipeline_wait_prior(0);
    __syncwarp();
  }
};

// Loads the weights of the lane's channels, 0 beyond the last channel. `scratch` has room for kChannels * K * K values:
// the rows of `weight` are short and are read in the order of memory.
template <int K, class T, int kPer>
__device__ void load_weights(float (&weights)[K * K][kPer], const T* weight, const Slab<T, kPer>& slab, bool flip,
                             T* scratch) {
  const int known = min(slab.kChannels, slab.channels - slab.first) * K * K;
  const T* from = weight + static_cast<int64_t>(slab.first) * K * K;
  for (int i = slab.lane; i < known; i += kLanes) scratch[i] = from[i];
  __syncwarp();
#pragma unroll
  for (int k = 0; k < K * K; ++k) {
    const int tap = flip ? K * K - 1 - k : k;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      weights[k][j] = slab.inside(j) ? widen(scratch[(slab.lane * kPer + j) * K * K + tap]) : 0.0f;
    }
  }
  __syncwarp();
}

template <class T>
struct ConvArguments {
  const T* x;
  const T* weight;
  const float* bias;
  const T* residual;
  T* out;
  float* rstd;
  Squares squares;
  int channels;
  int per_warp;  // squares that a warp (or, if rows are normalised, a block) takes in turn
  float eps;
  bool flip, packs;
};

template <class T>
struct WeightGradArguments {
  const T* grad;
  const T* x;
  float* partial;
  Squares squares;
  int channels;
  int per_range;  // squares of a range
  bool packs;
};

// The bytes of shared memory that each warp and, in addition, each block needs.
struct MemorySize {
  int64_t warp, block;
};

// The kernels for a dtype, a kernel size and a size of squares, and what their launch depends on.
template <class T>
struct SquareKernels {
  void (*conv)(ConvArguments<T>);
  void (*weight_grad)(WeightGradArguments<T>);
  MemorySize conv_memory, grad_memory;
  int side;      // of a square
  int channels;  // of a slab
  int outputs;   // sites of which a block of `conv` holds moments
  int most;      // squares that a warp of `conv` takes in turn
  int at_once;   // squares that a warp of `weight_grad` takes together
};

// Return the kernels of depthwise_halo.cu and depthwise_window.cu.
template <class T>
SquareKernels<T> halo_kernels(int kernel_size, int side);
template <class T>
SquareKernels<T> window_kernels(int kernel_size, int side);

// Returns f(integral_constant<int, K>) for a kernel size that has kernels of its own.
template <class F>
auto for_kernel(int size, const F& f) {
  switch (size) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, 7>());
  }
}

// Ends a weight gradient: adds up the sums of all warps of the block, in order, and stores them to partial[blockIdx.x].
// Every warp has `stride` floats of `scratch`, room for its (K * K + 1, kChannels) sums.
template <int K, class T, int kPer>
__device__ void add_up_warps(const float (&sums)[K * K][kPer], const float (&total)[kPer], const Slab<T, kPer>& slab,
                             float* scratch, int stride, float* partial) {
  constexpr int kChannels = Slab<T, kPer>::kChannels;
  float* own = scratch + threadIdx.x / kLanes * stride + slab.lane * kPer;
#pragma unroll
  for (int k = 0; k < K * K; ++k) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) own[k * kChannels + j] = sums[k][j];
  }
#pragma unroll
  for (int j = 0; j < kPer; ++j) own[K * K * kChannels + j] = total[j];
  __syncthreads();
  const int warps = blockDim.x / kLanes;
  for (int i = threadIdx.x; i < (K * K + 1) * kChannels; i += blockDim.x) {
    float sum = scratch[i];
    for (int w = 1; w < warps; ++w) sum += scratch[w * stride + i];
    const int channel = slab.first + i % kChannels;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (K * K + 1) + i / kChannels;
    if (channel < slab.channels) partial[row * slab.channels + channel] = sum;
  }
}

}  // namespace sparsecnx::cuda
