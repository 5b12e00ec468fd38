// Depthwise convolution of squares of 2 x 2 and 1 x 1 sites (see depthwise_squares.cuh). Such squares see many times
// their own size, and consecutive squares see nearly the same sites. So the warp takes several consecutive squares and
// stages once the run of rows that contains everything they see. On the coarse grids of these stages that is about an
// image. If the run is too long (a wide grid, masked site by site), the warp takes the squares one by one and gathers
// their neighbours.
#include "depthwise_finish.cuh"

namespace sparsecnx::cuda {
namespace {

// Channels of a lane. They share the search for neighbours. In 32 bits the shared memory is too small for two.
template <class T>
constexpr int kWindowPer = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kWindowChannels = kWindowPer<T> * kLanes;

// The neighbours of a square are read four at a time.
template <int K, int S>
constexpr int kPitch = (Reach<K, S>::kAround + 3) / 4 * 4;

// The shared memory of a warp.
template <class T, int K, int S>
struct WindowMemory {
  static constexpr int kSquares = kSquaresAtOnce<S>;
  static constexpr int kOutputs = kSquares * S * S;

  alignas(16) T window[kWindowRows * kWindowChannels<T>];
  T outputs[kOutputs * kWindowChannels<T>];  // of the weight gradient: the incoming gradient
  alignas(16) int around[kSquares * kPitch<K, S>];
};

// The content of the window in shared memory: the run of squares that all squares of the warp see or, if that is too
// long, the neighbours of one square.
struct Window {
  int first, count;  // of the run
  bool fits;

  // Returns the number of squares that are computed from one filling.
  __device__ int together(int squares) const { return fits ? squares : 1; }

  // Returns the offset in the window of the j-th neighbour of a square, for its value in `around`.
  __device__ int offset(int around, int j, int size) const { return fits ? around : j * size; }
};

// Finds the neighbours of squares [q, q + count) and the run that contains them. `around` gets -1 for a masked
// neighbour, otherwise its offset in the window or, if the run does not fit, its number.
template <class T, int K, int S>
__device__ Window seek_window(const Squares& squares, int q, int count, int* around, int lane) {
  using R = Reach<K, S>;
  int low = 0x7fffffff, high = -1;
  for (int i = lane; i < count * kPitch<K, S>; i += kLanes) {
    const int j = i % kPitch<K, S>, dy = j / R::kAcross - R::kSquares, dx = j % R::kAcross - R::kSquares;
    const int square = j < R::kAround ? squares.neighbour(q + i / kPitch<K, S>, dy, dx) : -1;
    around[i] = square;
    if (square >= 0) low = min(low, square);
    high = max(high, square);
  }
  for (int step = 1; step < kLanes; step *= 2) {
    low = min(low, __shfl_xor_sync(kAll, low, step));
    high = max(high, __shfl_xor_sync(kAll, high, step));
  }
  const Window window{low, high - low + 1, (high - low + 1) * (S * S) <= kWindowRows};
  if (window.fits) {
    for (int i = lane; i < count * kPitch<K, S>; i += kLanes) {  // the same entries as above
      if (around[i] >= 0) around[i] = (around[i] - low) * (S * S * kWindowChannels<T>);
    }
  }
  __syncwarp();
  return window;
}

// Starts to fill the window for the squares whose neighbours begin at `around`.
template <int K, int S, class T>
__device__ void fetch_window(const Slab<T, kWindowPer<T>>& slab, T* to, const T* x, Window window, const int* around) {
  using R = Reach<K, S>;
  static_assert(R::kAround * S * S <= kWindowRows);
  if (window.fits) {
    slab.fetch(to, x, window.count * (S * S), [&](int i) { return window.first * (S * S) + i; });
  } else {
    slab.fetch(to, x, R::kAround * (S * S), [&](int i) {
      const int square = around[i / (S * S)];
      return square < 0 ? -1 : square * (S * S) + i % (S * S);
    });
  }
}

// Calls f(output, tap, values) for every visible site that a square sees and every output that sees it. The lane's
// values begin at `column` in the window.
template <int K, int S, class T, class F>
__device__ __forceinline__ void for_window(const T* column, Window window, const int* around, const F& f) {
  using R = Reach<K, S>;
#pragma unroll
  for (int j0 = 0; j0 < R::kAround; j0 += 4) {
    const int4 four = *reinterpret_cast<const int4*>(around + j0);
#pragma unroll
    for (int j = j0; j < min(j0 + 4, R::kAround); ++j) {
      const int there = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
      if (there >= 0) {
        const T* at = column + window.offset(there, j, S * S * kWindowChannels<T>);
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
          const int y = j / R::kAcross * S - R::kShift + (i >> 1), x = j % R::kAcross * S - R::kShift + (i & 1);
          if (y >= 0 && y < R::kHalo && x >= 0 && x < R::kHalo) {
            float values[kWindowPer<T>];
            Slab<T, kWindowPer<T>>::read(at + i * kWindowChannels<T>, values);
            for_outputs<K, S>(y, x, [&](int output, int tap) { f(output, tap, values); });
          }
        }
      }
    }
  }
}

// Like depthwise_halo_kernel, but a warp takes its squares together.
template <class T, int K, int S>
__global__ void __launch_bounds__(kMostWarps<T>* kLanes, 1) depthwise_window_kernel(const ConvArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = WindowMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  Moments* moments = reinterpret_cast<Moments*>(memories + warps);  // (warps, kOutputs)
  float2* scales = reinterpret_cast<float2*>(moments + warps * Memory::kOutputs);
  static_assert(K * K <= kWindowRows, "the weights of a slab pass through the window's memory");
  const bool normalise = a.rstd != nullptr;
  const int slabs = (a.channels + kWindowChannels<T> - 1) / kWindowChannels<T>;
  const int first_slab = normalise ? warp : blockIdx.y, slab_step = normalise ? warps : slabs;
  const int begin = a.squares.at((normalise ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * warps + warp) * a.per_warp);
  const int count = a.squares.at(int64_t{begin} + a.per_warp) - begin;
  if (!normalise && count == 0) return;
  const Finish<T, kWindowPer<T>> finish{a.out, int64_t{begin} * (S * S), count * (S * S)};
  const auto place = [](int i) { return i; };
  if (normalise) {
    for (int i = lane; i < Memory::kOutputs; i += kLanes) {
      moments[warp * Memory::kOutputs + i] = Moments{0.0f, 0.0f, 0.0f};
    }
  }
  const Window window = seek_window<T, K, S>(a.squares, begin, count, memory.around, lane);

  for (int s = first_slab; s < slabs; s += slab_step) {
    const Slab<T, kWindowPer<T>> slab(a.channels, s, a.packs);
    float weights[K * K][kWindowPer<T>], bias[kWindowPer<T>];
    load_weights<K>(weights, a.weight, slab, a.flip, memory.window);
#pragma unroll
    for (int j = 0; j < kWindowPer<T>; ++j) {
      bias[j] = a.bias != nullptr && slab.inside(j) ? a.bias[slab.channel(j)] : 0.0f;
    }
    for (int n0 = 0; n0 < count; n0 += window.together(count)) {
      fetch_window<K, S>(slab, memory.window, a.x, window, memory.around + n0 * kPitch<K, S>);
      slab.arrive();
#pragma unroll 1
      for (int n = n0; n < n0 + window.together(count); ++n) {
        float sums[S * S][kWindowPer<T>];
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
#pragma unroll
          for (int j = 0; j < kWindowPer<T>; ++j) {
            sums[i][j] = bias[j];
            if (a.residual != nullptr && slab.inside(j)) {
              sums[i][j] += widen(a.residual[slab.offset((begin + n) * (S * S) + i, lane * kWindowPer<T> + j)]);
            }
          }
        }
        const T* column = memory.window + lane * kWindowPer<T>;
        for_window<K, S>(column, window, memory.around + n * kPitch<K, S>, [&](int i, int tap, const auto& values) {
#pragma unroll
          for (int j = 0; j < kWindowPer<T>; ++j) sums[i][j] = fmaf(values[j], weights[tap][j], sums[i][j]);
        });
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
          slab.write(memory.outputs + (n * S * S + i) * kWindowChannels<T> + lane * kWindowPer<T>, sums[i]);
        }
      }
      __syncwarp();
    }
    if (normalise) finish.measure(slab, memory.outputs, place, moments + warp * Memory::kOutputs);
    if (!normalise || slabs > warps) finish.store(slab, memory.outputs, place);
    __syncwarp();
  }
  if (normalise) {
    __syncthreads();
    settle(moments, warps, Memory::kOutputs, count * (S * S), a.eps, scales, a.rstd + int64_t{begin} * (S * S));
    __syncthreads();
    for (int s = first_slab; s < slabs; s += slab_step) {
      const Slab<T, kWindowPer<T>> slab(a.channels, s, a.packs);
      finish.normalise(slab, slabs > warps ? nullptr : memory.outputs, place, scales);
    }
  }
}

// Like depthwise_halo_grad_kernel.
template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, kGradBlocks<T>)
    depthwise_window_grad_kernel(const WeightGradArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = WindowMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  const Slab<T, kWindowPer<T>> slab(a.channels, blockIdx.y, a.packs);
  const int begin = a.squares.at(int64_t{blockIdx.x} * a.per_range);
  const int end = a.squares.at(int64_t{begin} + a.per_range);

  static_assert((K * K + 1) * kWindowChannels<T> * sizeof(float) <= sizeof(Memory), "as add_up_warps needs");
  float sums[K * K][kWindowPer<T>], total[kWindowPer<T>];
#pragma unroll
  for (int j = 0; j < kWindowPer<T>; ++j) {
    total[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < K * K; ++k) sums[k][j] = 0.0f;
  }
  for (int q = begin + warp * Memory::kSquares; q < end; q += warps * Memory::kSquares) {
    const int count = min(Memory::kSquares, end - q);
    const Window window = seek_window<T, K, S>(a.squares, q, count, memory.around, lane);
    slab.fetch(memory.outputs, a.grad, count * (S * S), [&](int i) { return q * (S * S) + i; });
    for (int n0 = 0; n0 < count; n0 += window.together(count)) {
      fetch_window<K, S>(slab, memory.window, a.x, window, memory.around + n0 * kPitch<K, S>);
      slab.arrive();
#pragma unroll 1
      for (int n = n0; n < n0 + window.together(count); ++n) {
        float grads[S * S][kWindowPer<T>];
#pragma unroll
        for (int i = 0; i < S * S; ++i) {
          slab.read(memory.outputs + (n * S * S + i) * kWindowChannels<T> + lane * kWindowPer<T>, grads[i]);
#pragma unroll
          for (int j = 0; j < kWindowPer<T>; ++j) total[j] += grads[i][j];
        }
        const T* column = memory.window + lane * kWindowPer<T>;
        for_window<K, S>(column, window, memory.around + n * kPitch<K, S>, [&](int i, int tap, const auto& values) {
#pragma unroll
          for (int j = 0; j < kWindowPer<T>; ++j) sums[tap][j] = fmaf(values[j], grads[i][j], sums[tap][j]);
        });
      }
      __syncwarp();
    }
  }
  add_up_warps<K>(sums, total, slab, reinterpret_cast<float*>(memories), sizeof(Memory) / sizeof(float), a.partial);
}

template <class T, int K, int S>
SquareKernels<T> kernels() {
  constexpr MemorySize kMemory{sizeof(WindowMemory<T, K, S>), 0};
  return {depthwise_window_kernel<T, K, S>,
          depthwise_window_grad_kernel<T, K, S>,
          kMemory,
          kMemory,
          S,
          kWindowChannels<T>,
          WindowMemory<T, K, S>::kOutputs,
          kSquaresAtOnce<S>,
          kSquaresAtOnce<S>};
}

}  // namespace

template <class T>
SquareKernels<T> window_kernels(int kernel_size, int side) {
  return for_kernel(kernel_size,
                    [&](auto size) { return side == 2 ? kernels<T, size(), 2>() : kernels<T, size(), 1>(); });
}
template SquareKernels<float> window_kernels(int, int);
template SquareKernels<__nv_bfloat16> window_kernels(int, int);
template SquareKernels<__half> window_kernels(int, int);

}  // namespace sparsecnx::cuda
