// Depthwise convolution on the GPU: the kernels for any kernel size, the second stage of weight gradients, and the choice
// and launch of all kernels.
#include <algorithm>

#include "depthwise_finish.cuh"
#include "launch.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kGroup = 8;  // rows of threads that share a sum

// Finds the rows that an output site reads, tap by tap, for a kernel of any size.
struct Taps {
  int kernel_h, kernel_w;

  __host__ __device__ int count() const { return kernel_h * kernel_w; }

  // Returns the row that `row` reads through a tap, -1 if that site is masked. `sites` are squares of one site.
  __device__ int64_t read_by(const Squares& sites, int64_t row, int tap) const {
    return sites.neighbour(static_cast<int>(row), tap / kernel_w - kernel_h / 2, tap % kernel_w - kernel_w / 2);
  }
};

// A thread computes a pack of channels of a row, or one channel where packs do not fit.
template <class T, class Move>
__global__ void __launch_bounds__(256)
    depthwise_general_kernel(const ConvArguments<T> a, const Taps taps, int64_t rows) {
  const int parts = a.channels / Move::kValues;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * parts; i += step) {
    const int64_t row = i / parts;
    const int channel = static_cast<int>(i % parts) * Move::kValues;
    float sums[Move::kValues];
#pragma unroll
    for (int k = 0; k < Move::kValues; ++k) sums[k] = a.bias != nullptr ? a.bias[channel + k] : 0.0f;
    for (int tap = 0; tap < taps.count(); ++tap) {
      const int64_t from = taps.read_by(a.squares, row, tap);
      if (from < 0) continue;
      const Pack<T> values = Move::load(a.x + from * a.channels + channel);
      const T* weight = a.weight + int64_t{channel} * taps.count() + (a.flip ? taps.count() - 1 - tap : tap);
#pragma unroll
      for (int k = 0; k < Move::kValues; ++k) {
        sums[k] = fmaf(widen(values.at[k]), widen(weight[int64_t{k} * taps.count()]), sums[k]);
      }
    }
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < Move::kValues; ++k) {
      if (a.residual != nullptr) sums[k] += widen(a.residual[row * a.channels + channel + k]);
      out.at[k] = narrow<T>(sums[k]);
    }
    Move::store(a.out + row * a.channels + channel, out);
  }
}

// Normalises every row of `out` to zero mean and unit variance, in place. A warp takes a row.
template <class T, class Move>
__global__ void __launch_bounds__(256) normalise_rows_kernel(const ConvArguments<T> a, int64_t rows) {
  const int lane = threadIdx.x % kLanes;
  const int64_t step = int64_t{gridDim.x} * (blockDim.x / kLanes);
  for (int64_t row = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes; row < rows; row += step) {
    T* at = a.out + row * a.channels;
    Moments m{0.0f, 0.0f, 0.0f};
    for (int c = lane * Move::kValues; c < a.channels; c += kLanes * Move::kValues) {
      const Pack<T> values = Move::load(at + c);
#pragma unroll
      for (int k = 0; k < Move::kValues; ++k) m = m.merged(Moments{1.0f, widen(values.at[k]), 0.0f});
    }
    m = merged_across<kLanes>(m);
    const float scale = rsqrtf(m.squares / a.channels + a.eps);
    if (lane == 0) a.rstd[row] = scale;
    for (int c = lane * Move::kValues; c < a.channels; c += kLanes * Move::kValues) {
      Pack<T> values = Move::load(at + c);
#pragma unroll
      for (int k = 0; k < Move::kValues; ++k) values.at[k] = narrow<T>((widen(values.at[k]) - m.mean) * scale);
      Move::store(at + c, values);
    }
  }
}

// Adds up, in order, the values of each column of (kGroup, kLanes) threads. The first thread gets the sum.
__device__ float column_sum(float value) {
  float* sums = shared_memory<float>();
  sums[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x < kLanes) {
    for (int group = 1; group < kGroup; ++group) value += sums[group * kLanes + threadIdx.x];
  }
  return value;
}

// Sums over a range of rows, blockIdx.y, for 32 channels and one tap. After the last tap it sums the gradient itself.
template <class T>
__global__ void __launch_bounds__(kGroup* kLanes)
    depthwise_general_grad_kernel(const WeightGradArguments<T> a, const Taps taps, int64_t rows, int64_t per_range) {
  const int tap = blockIdx.x % (taps.count() + 1);
  const int channel = blockIdx.x / (taps.count() + 1) * kLanes + threadIdx.x % kLanes;
  const int64_t begin = blockIdx.y * per_range, end = min(begin + per_range, rows);
  float sum = 0.0f;
  if (channel < a.channels) {
    for (int64_t row = begin + threadIdx.x / kLanes; row < end; row += kGroup) {
      const float grad = widen(a.grad[row * a.channels + channel]);
      if (tap == taps.count()) {
        sum += grad;
      } else {
        const int64_t from = taps.read_by(a.squares, row, tap);
        if (from >= 0) sum = fmaf(grad, widen(a.x[from * a.channels + channel]), sum);
      }
    }
  }
  sum = column_sum(sum);
  if (threadIdx.x < kLanes && channel < a.channels) {
    a.partial[(int64_t{blockIdx.y} * (taps.count() + 1) + tap) * a.channels + channel] = sum;
  }
}

// Second stage of weight gradients: adds up all ranges for 32 channels and one tap.
template <class T>
__global__ void __launch_bounds__(kGroup* kLanes) add_up_ranges_kernel(const float* partial, int64_t ranges, int taps,
                                                                       int channels, T* grad_weight, float* grad_bias) {
  const int tap = blockIdx.x % (taps + 1);
  const int channel = blockIdx.x / (taps + 1) * kLanes + threadIdx.x % kLanes;
  const int64_t stride = int64_t{taps + 1} * channels;
  float sum = 0.0f;
  if (channel < channels) {
    const float* from = partial + int64_t{tap} * channels + channel;
#pragma unroll 8
    for (int64_t range = threadIdx.x / kLanes; range < ranges; range += kGroup) sum += from[range * stride];
  }
  sum = column_sum(sum);
  if (threadIdx.x < kLanes && channel < channels) {
    if (tap == taps) {
      grad_bias[channel] = sum;
    } else {
      grad_weight[int64_t{channel} * taps + tap] = narrow<T>(sum);
    }
  }
}

// The properties of the current device that matter here.
struct Device {
  int processors;
  int64_t shared_bytes;  // that a block may use

  static Device current() {
    int device = 0, processors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    return {processors, most_shared_bytes()};
  }

  // Returns how many blocks a multiprocessor holds at once, if its registers allow `most`.
  int64_t resident(int64_t most, int64_t bytes) const {
    constexpr int64_t kReserved = 1024;  // shared memory reserved for each block; shared_bytes excludes it once
    return std::clamp<int64_t>((shared_bytes + kReserved) / (bytes + kReserved), 1, most);
  }
};

// The blocks of warps that share nothing; the registers of a multiprocessor allow `most` blocks.
struct Blocks {
  int64_t warps, bytes, resident;

  Blocks(MemorySize memory, Device device, int64_t most)
      : warps(std::min<int64_t>(kThreads / kLanes, (device.shared_bytes - memory.block) / memory.warp)),
        bytes(warps * memory.warp + memory.block),
        resident(device.resident(most, bytes)) {}
};

// Returns whether a kernel size has kernels of its own.
bool specialised(const DepthwiseGeometry& g) {
  return g.kernel_h == g.kernel_w && (g.kernel_h == 3 || g.kernel_h == 5 || g.kernel_h == 7);
}

// Returns these kernels for the largest squares that a tile is divided into.
template <class T>
SquareKernels<T> square_kernels(const DepthwiseGeometry& g) {
  int side = 8;
  while (g.tile % side != 0) side /= 2;
  return side >= 4 ? halo_kernels<T>(g.kernel_h, side) : window_kernels<T>(g.kernel_h, side);
}

// Returns whether rows of `channels` values at these addresses can be moved 16 bytes at a time.
template <class T>
bool in_packs(int channels, std::initializer_list<const void*> pointers) {
  bool aligned = channels * sizeof(T) % 16 == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// Returns how many squares each worker takes in turn, at most `most`, so that each of `resident` workers has two turns.
int squares_each(int64_t squares, int64_t resident, int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(squares / (resident * 2), 1, most));
}

template <class T>
ConvArguments<T> conv_arguments(const DepthwiseConv& job, int side, int per_warp) {
  const DepthwiseGeometry& g = job.geometry;
  return {static_cast<const T*>(job.x),
          static_cast<const T*>(job.weight),
          job.bias,
          static_cast<const T*>(job.residual),
          static_cast<T*>(job.out),
          job.rstd,
          Squares(g, side),
          g.channels,
          per_warp,
          job.eps,
          job.flip,
          in_packs<T>(g.channels, {job.x, job.out})};
}

template <class T>
WeightGradArguments<T> grad_arguments(const DepthwiseWeightGrad& job, int side) {
  const Squares squares(job.geometry, side);
  return {static_cast<const T*>(job.grad),
          static_cast<const T*>(job.x),
          job.partial,
          squares,
          job.geometry.channels,
          static_cast<int>(std::max<int64_t>(1, blocks_of(squares.count, job.ranges))),
          in_packs<T>(job.geometry.channels, {job.grad, job.x})};
}

// Launches the kernel for squares. Its warps take so few squares in turn that multiprocessors have work for two rounds.
template <class T>
void launch_squares(const DepthwiseConv& job, Device device, cudaStream_t stream) {
  const SquareKernels<T> k = square_kernels<T>(job.geometry);
  const int64_t squares = Squares(job.geometry, k.side).count, slabs = blocks_of(job.geometry.channels, k.channels);
  const auto launch_grid = [&](int64_t x, int64_t y, int64_t warps, int64_t bytes, int each) {
    launch("depthwise convolution", k.conv, dim3(x, y), dim3(warps * kLanes), bytes, stream,
           conv_arguments<T>(job, k.side, each));
  };
  if (job.rstd != nullptr) {
    // The warps of a block share its squares. There are as many warps as slabs, or an equal part of them.
    const int64_t shared = k.outputs * sizeof(float2) + k.conv_memory.block;
    const int64_t each_warp = k.conv_memory.warp + k.outputs * sizeof(Moments);
    const int64_t fit = std::min<int64_t>(kMostWarps<T>, (device.shared_bytes - shared) / each_warp);
    const int64_t warps = blocks_of(slabs, blocks_of(slabs, fit)), bytes = warps * each_warp + shared;
    const int64_t blocks = device.processors * device.resident(kMostWarps<T> / warps, bytes);
    const int each = squares_each(squares, blocks, k.most);
    launch_grid(blocks_of(squares, each), 1, warps, bytes, each);
  } else {
    const Blocks blocks(k.conv_memory, device, kMostWarps<T> * kLanes / kThreads);
    const int each = squares_each(squares * slabs, device.processors * blocks.resident * blocks.warps, k.most);
    launch_grid(blocks_of(squares, blocks.warps * each), slabs, blocks.warps, blocks.bytes, each);
  }
}

template <class T, class Move>
void launch_general(const DepthwiseConv& job, const ConvArguments<T>& arguments, Device device, cudaStream_t stream) {
  const int64_t rows = job.geometry.rows(), most = int64_t{16} * device.processors;
  const int64_t threads = rows * (job.geometry.channels / Move::kValues);
  launch("depthwise_general_kernel", depthwise_general_kernel<T, Move>, dim3(std::min(blocks_of(threads, 256), most)),
         dim3(256), 0, stream, arguments, Taps{job.geometry.kernel_h, job.geometry.kernel_w}, rows);
  if (job.rstd != nullptr) {
    launch("normalise_rows_kernel", normalise_rows_kernel<T, Move>, dim3(std::min(blocks_of(rows, 8), most)), dim3(256),
           0, stream, arguments, rows);
  }
}

}  // namespace

void run_depthwise_conv(const DepthwiseConv& job, cudaStream_t stream) {
  const Device device = Device::current();
  for_dtype(job.geometry.dtype, [&]<class T>(Tag<T>) {
    if (specialised(job.geometry)) return launch_squares<T>(job, device, stream);
    const ConvArguments<T> arguments = conv_arguments<T>(job, 1, 1);
    arguments.packs ? launch_general<T, Sixteen<T>>(job, arguments, device, stream)
                    : launch_general<T, Single<T>>(job, arguments, device, stream);
  });
}

// With kernels for squares, it is one wave of blocks. Each warp takes its squares in at least two turns, so that there
// are few partial sums compared with rows.
int64_t depthwise_ranges(const DepthwiseGeometry& g) {
  const Device device = Device::current();
  if (!specialised(g)) {
    const int64_t blocks = blocks_of(g.channels, kLanes) * (g.kernel_h * g.kernel_w + 1);
    return std::clamp<int64_t>(8 * device.processors / blocks, 1, blocks_of(std::max<int64_t>(g.rows(), 1), 64));
  }
  return for_dtype(g.dtype, [&]<class T>(Tag<T>) {
    const SquareKernels<T> k = square_kernels<T>(g);
    const Blocks blocks(k.grad_memory, device, kGradBlocks<T>);
    const int64_t most = std::max<int64_t>(1, Squares(g, k.side).count / (2 * k.at_once * blocks.warps));
    return std::clamp<int64_t>(device.processors * blocks.resident / blocks_of(g.channels, k.channels), 1, most);
  });
}

void run_depthwise_weight_grad(const DepthwiseWeightGrad& job, cudaStream_t stream) {
  const DepthwiseGeometry& g = job.geometry;
  const int taps = g.kernel_h * g.kernel_w;
  const dim3 sums(blocks_of(g.channels, kLanes) * (taps + 1)), threads(kGroup * kLanes);
  const size_t bytes = kGroup * kLanes * sizeof(float);
  for_dtype(g.dtype, [&]<class T>(Tag<T>) {
    if (specialised(g)) {
      const SquareKernels<T> k = square_kernels<T>(g);
      const Blocks blocks(k.grad_memory, Device::current(), kGradBlocks<T>);
      launch("depthwise weight gradient", k.weight_grad, dim3(job.ranges, blocks_of(g.channels, k.channels)),
             dim3(blocks.warps * kLanes), blocks.bytes, stream, grad_arguments<T>(job, k.side));
    } else {
      launch("depthwise_general_grad_kernel", depthwise_general_grad_kernel<T>, dim3(sums.x, job.ranges), threads,
             bytes, stream, grad_arguments<T>(job, 1), Taps{g.kernel_h, g.kernel_w}, g.rows(),
             blocks_of(std::max<int64_t>(g.rows(), 1), job.ranges));
    }
    launch("add_up_ranges_kernel", add_up_ranges_kernel<T>, sums, threads, bytes, stream, job.partial, job.ranges, taps,
           g.channels, static_cast<T*>(job.grad_weight), job.grad_bias);
  });
}

}  // namespace sparsecnx::cuda
