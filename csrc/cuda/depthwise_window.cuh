// Depthwise convolution of squares of 2 x 2 and 1 x 1 sites, see depthwise_conv.cuh. Such squares see many times their
// own size, and their neighbours see much the same: the warp takes several squares in a row and stages, once, the run
// of rows in which all that they see lies. On the coarse grids of these stages that is about an image. A run that is
// too long (a wide grid, masked site by site) is read where it lies.
#pragma once

#include "depthwise_conv.cuh"

namespace sparsecnx::cuda {

// Shared memory of a warp.
template <class T, int K, int S>
struct WindowMemory {
  static constexpr int kSquares = kSquaresAtOnce<S>;
  static constexpr int kOutputs = kSquares * S * S;
  static constexpr int kBlockBytes = 0;

  alignas(16) T window[kWindowRows * kSlab];
  T outputs[kOutputs * kSlab];  // of the weight gradient: the incoming gradient
  int around[kSquares * Reach<K, S>::kAround];
};

// The run of squares that some squares see.
struct Window {
  int first, count;
};

// The neighbours of squares [q, q + count), and the run in which they lie.
template <int K, int S>
__device__ Window seek_window(const Squares& squares, int q, int count, int* around, int lane) {
  using R = Reach<K, S>;
  int low = 0x7fffffff, high = -1;
  for (int i = lane; i < count * R::kAround; i += kLanes) {
    const int j = i % R::kAround;
    const int square =
        squares.neighbour(q + i / R::kAround, j / R::kAcross - R::kSquares, j % R::kAcross - R::kSquares);
    around[i] = square;
    if (square >= 0) low = min(low, square);
    high = max(high, square);
  }
  for (int step = 1; step < kLanes; step *= 2) {
    low = min(low, __shfl_xor_sync(kAll, low, step));
    high = max(high, __shfl_xor_sync(kAll, high, step));
  }
  __syncwarp();
  return {low, high - low + 1};
}

// f(line, column, value) for every visible site that a square sees, counted from the first that it sees.
// value_of(square, i) gives the lane's value of site i of a square.
template <int K, int S, class V, class F>
__device__ __forceinline__ void for_window(const int* around, const V& value_of, const F& f) {
  using R = Reach<K, S>;
#pragma unroll
  for (int j = 0; j < R::kAround; ++j) {
    const int square = around[j];
    if (square >= 0) {
#pragma unroll
      for (int i = 0; i < S * S; ++i) {
        const int y = j / R::kAcross * S - R::kShift + (i >> 1), x = j % R::kAcross * S - R::kShift + (i & 1);
        if (y >= 0 && y < R::kHalo && x >= 0 && x < R::kHalo) f(y, x, value_of(square, i));
      }
    }
  }
}

// Calls f(value_of) with what reads the lane's value of a site, staged or not.
template <class T, int S, class F>
__device__ __forceinline__ void with_values(const Slab<T>& slab, const T* x, const T* window, Window run, bool staged,
                                            const F& f) {
  if (staged) {
    const T* column = window + slab.lane;
    f([&](int square, int i) { return widen(column[((square - run.first) * (S * S) + i) * kSlab]); });
  } else {
    const T* column = x + slab.first + slab.lane;
    f([&](int square, int i) {
      const int64_t row = static_cast<int64_t>(square) * (S * S) + i;
      return slab.inside() ? widen(column[row * slab.channels]) : 0.0f;
    });
  }
}

// As depthwise_halo_kernel, but a warp takes its squares together.
template <class T, int K, int S, bool kNormalise>
__global__ void __launch_bounds__(kNormalise ? kMostWarps<T> * kLanes : kThreads, kNormalise ? 1 : kBlocks<T>)
    depthwise_window_kernel(const ConvArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = WindowMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  Moments* moments = reinterpret_cast<Moments*>(memories + warps);  // (warps, kOutputs)
  float2* scales = reinterpret_cast<float2*>(moments + warps * Memory::kOutputs);
  const int slabs = (a.channels + kSlab - 1) / kSlab;
  const int first_slab = kNormalise ? warp : blockIdx.y, slab_step = kNormalise ? warps : slabs;
  const int begin = a.squares.at((kNormalise ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * warps + warp) * a.per_warp);
  const int count = a.squares.at(int64_t{begin} + a.per_warp) - begin;
  if (!kNormalise && count == 0) return;
  const Finish<T> finish{a.out, int64_t{begin} * (S * S), count * (S * S)};
  const auto place = [](int i) { return i; };
  if constexpr (kNormalise) {
    for (int i = lane; i < Memory::kOutputs; i += kLanes) {
      moments[warp * Memory::kOutputs + i] = Moments{0.0f, 0.0f, 0.0f};
    }
  }
  const Window run = seek_window<K, S>(a.squares, begin, count, memory.around, lane);
  const bool staged = run.count * (S * S) <= kWindowRows;

  for (int s = first_slab; s < slabs; s += slab_step) {
    const Slab<T> slab(a.channels, s * kSlab, a.packs);
    float weights[K * K];
    load_weights<T, K>(weights, a.weight, slab, a.flip, memory.window);
    if (staged) slab.fetch(memory.window, a.x, run.count * (S * S), [&](int i) { return run.first * (S * S) + i; });
    const float bias = a.bias != nullptr && slab.inside() ? a.bias[slab.channel()] : 0.0f;
    slab.arrive();
    with_values<T, S>(slab, a.x, memory.window, run, staged, [&](const auto& value_of) {
#pragma unroll 1
      for (int n = 0; n < count; ++n) {
        float sums[S * S];
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
          sums[i] = bias;
          if (a.residual != nullptr && slab.inside()) {
            sums[i] += widen(a.residual[slab.offset((begin + n) * (S * S) + i, lane)]);
          }
        }
        for_window<K, S>(memory.around + n * R::kAround, value_of, [&](int y, int x, float value) {
#pragma unroll
          for (int i = 0; i < S * S; ++i) {
            const int ky = y - (i >> 1), kx = x - (i & 1);
            if (ky >= 0 && ky < K && kx >= 0 && kx < K) sums[i] = fmaf(value, weights[ky * K + kx], sums[i]);
          }
        });
#pragma unroll
        for (int i = 0; i < S * S; ++i) memory.outputs[(n * S * S + i) * kSlab + lane] = narrow<T>(sums[i]);
      }
    });
    __syncwarp();
    if (kNormalise) finish.measure(slab, memory.outputs, place, moments + warp * Memory::kOutputs);
    if (!kNormalise || slabs > warps) finish.store(slab, memory.outputs, place);
    __syncwarp();
  }
  if constexpr (kNormalise) {
    __syncthreads();
    settle(moments, warps, Memory::kOutputs, count * (S * S), a.eps, scales, a.rstd + int64_t{begin} * (S * S));
    __syncthreads();
    for (int s = first_slab; s < slabs; s += slab_step) {
      const Slab<T> slab(a.channels, s * kSlab, a.packs);
      finish.normalise(slab, slabs > warps ? nullptr : memory.outputs, place, scales);
    }
  }
}

// As depthwise_halo_grad_kernel.
template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, kGradBlocks<T>)
    depthwise_window_grad_kernel(const WeightGradArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = WindowMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  const Slab<T> slab(a.channels, blockIdx.y * kSlab, a.packs);
  const int begin = a.squares.at(int64_t{blockIdx.x} * a.per_range);
  const int end = a.squares.at(int64_t{begin} + a.per_range);

  float sums[K * K];
#pragma unroll
  for (int k = 0; k < K * K; ++k) sums[k] = 0.0f;
  float total = 0.0f;
  for (int q = begin + warp * Memory::kSquares; q < end; q += warps * Memory::kSquares) {
    const int count = min(Memory::kSquares, end - q);
    const Window run = seek_window<K, S>(a.squares, q, count, memory.around, lane);
    const bool staged = run.count * (S * S) <= kWindowRows;
    if (staged) slab.fetch(memory.window, a.x, run.count * (S * S), [&](int i) { return run.first * (S * S) + i; });
    slab.fetch(memory.outputs, a.grad, count * (S * S), [&](int i) { return q * (S * S) + i; });
    slab.arrive();
    with_values<T, S>(slab, a.x, memory.window, run, staged, [&](const auto& value_of) {
#pragma unroll 1
      for (int n = 0; n < count; ++n) {
        float grads[S * S];
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
          grads[i] = widen(memory.outputs[(n * S * S + i) * kSlab + lane]);
          total += grads[i];
        }
        for_window<K, S>(memory.around + n * R::kAround, value_of, [&](int y, int x, float value) {
#pragma unroll
          for (int i = 0; i < S * S; ++i) {
            const int ky = y - (i >> 1), kx = x - (i & 1);
            if (ky >= 0 && ky < K && kx >= 0 && kx < K) {
              sums[ky * K + kx] = fmaf(value, grads[i], sums[ky * K + kx]);
            }
          }
        });
      }
    });
    __syncwarp();
  }
  add_up_warps<K>(sums, total, slab, reinterpret_cast<float*>(memories), sizeof(Memory) / sizeof(float), a.partial);
}

}  // namespace sparsecnx::cuda
