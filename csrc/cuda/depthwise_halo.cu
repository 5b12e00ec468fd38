// Depthwise convolution of squares of 8 x 8 and 4 x 4 sites (see depthwise_squares.cuh). The warp gathers the halo of
// its square, the (S + K - 1)^2 sites that the outputs see. All S x S sums of a channel stay in registers, so a value
// is read once and serves all outputs that see it, up to min(K, S)^2 of them.
#include "depthwise_finish.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kHaloPer = 1;  // channels of a lane
constexpr int kHaloChannels = kHaloPer * kLanes;

// The shared memory of a warp.
template <class T, int K, int S>
struct HaloMemory {
  static constexpr int kSites = Reach<K, S>::kHalo * Reach<K, S>::kHalo;

  alignas(16) T halo[kSites * kHaloChannels];
  int rows[kSites];  // of x, -1 where the site is masked
};

template <int K, int S>
constexpr int64_t kPlaceBytes = HaloMemory<float, K, S>::kSites * sizeof(int);  // of `places`, which a block shares

// Stores for every site of a halo the neighbour of the square that contains it, times 64, plus its nested index there.
// It is the same for all squares, so the block computes it once.
template <int K, int S>
__device__ void find_places(int* places) {
  using R = Reach<K, S>;
  for (int i = threadIdx.x; i < R::kHalo * R::kHalo; i += blockDim.x) {
    const int y = i / R::kHalo + R::kShift, x = i % R::kHalo + R::kShift;
    places[i] = (y / S * R::kAcross + x / S) << 6 | nested_in_square<S>(y % S, x % S);
  }
  __syncthreads();
}

// Stores the rows of the halo of square q. Returns one bit for each neighbour of the square: whether it is visible.
template <int K, int S>
__device__ unsigned seek_halo(const Squares& squares, int q, const int* places, int* rows, int lane) {
  using R = Reach<K, S>;
  static_assert(R::kAround <= kLanes && S * S <= 64);
  const int dy = lane / R::kAcross - R::kSquares, dx = lane % R::kAcross - R::kSquares;
  const int around = lane < R::kAround ? squares.neighbour(q, dy, dx) : -1;
  const unsigned present = __ballot_sync(kAll, around >= 0);
  constexpr int kSites = R::kHalo * R::kHalo;
#pragma unroll 1  // Otherwise the compiler keeps values that depend on the lane alone in registers of the weights.
  for (int i0 = 0; i0 < kSites; i0 += kLanes) {
    const int i = min(i0 + lane, kSites - 1);
    const int place = places[i];
    const int square = __shfl_sync(kAll, around, place >> 6);
    rows[i] = square < 0 ? -1 : square * (S * S) + (place & 63);
  }
  __syncwarp();
  return present;
}

// Calls f(output, tap, value) for every visible site of the halo and every output that sees it. `column` points to the
// lane's value at the corner of the halo.
template <class T, int K, int S, class F>
__device__ __forceinline__ void for_halo(const T* column, unsigned present, const F& f) {
  using R = Reach<K, S>;
#pragma unroll
  for (int j = 0; j < R::kAround; ++j) {
    if (present >> j & 1) {
#pragma unroll
      for (int i = 0; i < S * S; ++i) {
        const int y = j / R::kAcross * S - R::kShift + i / S, x = j % R::kAcross * S - R::kShift + i % S;
        if (y >= 0 && y < R::kHalo && x >= 0 && x < R::kHalo) {
          const float value = widen(column[(y * R::kHalo + x) * kHaloChannels]);
          for_outputs<K, S>(y, x, [&](int output, int tap) { f(output, tap, value); });
        }
      }
    }
  }
}

// If rows are normalised, the warps of a block take the same square and different slabs. Otherwise each warp takes its
// own squares and blockIdx.y is the slab.
template <class T, int K, int S>
__global__ void __launch_bounds__(kMostWarps<T>* kLanes, 1) depthwise_halo_kernel(const ConvArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = HaloMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  Moments* moments = reinterpret_cast<Moments*>(memories + warps);  // (warps, S * S)
  float2* scales = reinterpret_cast<float2*>(moments + warps * S * S);
  static_assert(K * K <= Memory::kSites, "the weights of a slab pass through the halo's memory");
  const bool normalise = a.rstd != nullptr;
  int* places = normalise ? reinterpret_cast<int*>(scales + S * S) : reinterpret_cast<int*>(memories + warps);
  find_places<K, S>(places);
  const int slabs = (a.channels + kHaloChannels - 1) / kHaloChannels;
  const int first_slab = normalise ? warp : blockIdx.y, slab_step = normalise ? warps : slabs;
  const int begin = a.squares.at((normalise ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * warps + warp) * a.per_warp);
  const int end = a.squares.at(int64_t{begin} + a.per_warp);
  const auto place = [](int i) {
    return ((i >> 1 & 1) | (i >> 2 & 2) | (i >> 3 & 4)) * R::kHalo + ((i & 1) | (i >> 1 & 2) | (i >> 2 & 4));
  };

  float weights[K * K][kHaloPer];
  int held = -1;  // slab of the weights
  for (int q = begin; q < end; ++q) {
    const Finish<T, kHaloPer> finish{a.out, int64_t{q} * (S * S), S * S};
    if (normalise) {
      for (int i = lane; i < S * S; i += kLanes) moments[warp * S * S + i] = Moments{0.0f, 0.0f, 0.0f};
    }
    const unsigned present = seek_halo<K, S>(a.squares, q, places, memory.rows, lane);
    for (int s = first_slab; s < slabs; s += slab_step) {
      const Slab<T, kHaloPer> slab(a.channels, s, a.packs);
      if (held != s) {
        load_weights<K>(weights, a.weight, slab, a.flip, memory.halo);
        held = s;
      }
      slab.fetch(memory.halo, a.x, Memory::kSites, [&](int i) { return memory.rows[i]; });
      const float bias = a.bias != nullptr && slab.inside(0) ? a.bias[slab.channel(0)] : 0.0f;
      slab.arrive();
      float sums[S * S];  // in raster order
#pragma unroll
      for (int i = 0; i < S * S; ++i) sums[i] = bias;
      if (a.residual != nullptr && slab.inside(0)) {
        const T* residual = a.residual + slab.offset(q * (S * S), lane);
#pragma unroll
        for (int i = 0; i < S * S; ++i) sums[i] += widen(residual[nested_in_square<S>(i / S, i % S) * a.channels]);
      }
      T* column = memory.halo + lane;
      for_halo<T, K, S>(column, present,
                        [&](int i, int tap, float value) { sums[i] = fmaf(value, weights[tap][0], sums[i]); });
      // The outputs replace the halo: no other lane reads the lane's column.
#pragma unroll
      for (int i = 0; i < S * S; ++i) column[(i / S * R::kHalo + i % S) * kHaloChannels] = narrow<T>(sums[i]);
      __syncwarp();
      if (normalise) finish.measure(slab, memory.halo, place, moments + warp * S * S);
      if (!normalise || slabs > warps) finish.store(slab, memory.halo, place);
      __syncwarp();
    }
    if (normalise) {
      __syncthreads();
      settle(moments, warps, S * S, S * S, a.eps, scales, a.rstd + int64_t{q} * (S * S));
      __syncthreads();
      for (int s = first_slab; s < slabs; s += slab_step) {
        const Slab<T, kHaloPer> slab(a.channels, s, a.packs);
        finish.normalise(slab, slabs > warps ? nullptr : memory.halo, place, scales);
      }
      __syncthreads();
    }
  }
}

// The shared memory of a warp for the weight gradient: the halo and the incoming gradient of the square.
template <class T, int K, int S>
struct HaloGradMemory {
  HaloMemory<T, K, S> input;
  T grad[S * S * kHaloChannels];
};

// Sums grad * shifted x for every tap, and grad, over a range of squares (blockIdx.x) for a slab (blockIdx.y). The sums
// of all taps stay in registers. The sums of the warps are added up in order.
template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, kGradBlocks<T>) depthwise_halo_grad_kernel(const WeightGradArguments<T> a) {
  using R = Reach<K, S>;
  using Memory = HaloGradMemory<T, K, S>;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  Memory* memories = shared_memory<Memory>();
  Memory& memory = memories[warp];
  const Slab<T, kHaloPer> slab(a.channels, blockIdx.y, a.packs);
  const int begin = a.squares.at(int64_t{blockIdx.x} * a.per_range);
  const int end = a.squares.at(int64_t{begin} + a.per_range);

  int* places = reinterpret_cast<int*>(memories + warps);
  find_places<K, S>(places);
  static_assert((K * K + 1) * kHaloChannels * sizeof(float) <= sizeof(Memory), "as add_up_warps needs");

  float sums[K * K][kHaloPer];
#pragma unroll
  for (int k = 0; k < K * K; ++k) sums[k][0] = 0.0f;
  float total[kHaloPer] = {0.0f};
  for (int q = begin + warp; q < end; q += warps) {
    const unsigned present = seek_halo<K, S>(a.squares, q, places, memory.input.rows, lane);
    slab.fetch(memory.input.halo, a.x, HaloMemory<T, K, S>::kSites, [&](int i) { return memory.input.rows[i]; });
    slab.fetch(memory.grad, a.grad, S * S, [&](int i) { return q * (S * S) + i; });
    slab.arrive();
    float grads[S * S];  // in raster order
#pragma unroll
    for (int i = 0; i < S * S; ++i) {
      grads[i] = widen(memory.grad[nested_in_square<S>(i / S, i % S) * kHaloChannels + lane]);
      total[0] += grads[i];
    }
    for_halo<T, K, S>(memory.input.halo + lane, present,
                      [&](int i, int tap, float value) { sums[tap][0] = fmaf(value, grads[i], sums[tap][0]); });
    __syncwarp();
  }
  add_up_warps<K>(sums, total, slab, reinterpret_cast<float*>(memories), sizeof(Memory) / sizeof(float), a.partial);
}

constexpr int64_t kMost = 4;  // squares of a warp: loading its weights once is then a small part of the work

template <class T, int K, int S>
SquareKernels<T> kernels() {
  return {depthwise_halo_kernel<T, K, S>,
          depthwise_halo_grad_kernel<T, K, S>,
          {sizeof(HaloMemory<T, K, S>), kPlaceBytes<K, S>},
          {sizeof(HaloGradMemory<T, K, S>), kPlaceBytes<K, S>},
          S,
          kHaloChannels,
          S * S,
          kMost,
          1};
}

}  // namespace

template <class T>
SquareKernels<T> halo_kernels(int kernel_size, int side) {
  return for_kernel(kernel_size,
                    [&](auto size) { return side == 8 ? kernels<T, size(), 8>() : kernels<T, size(), 4>(); });
}
template SquareKernels<float> halo_kernels(int, int);
template SquareKernels<__nv_bfloat16> halo_kernels(int, int);
template SquareKernels<__half> halo_kernels(int, int);

}  // namespace sparsecnx::cuda
