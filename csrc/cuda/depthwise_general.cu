// Depthwise convolution on the GPU: the kernels for any kernel and tile of one to three axes, the second stage of weight
// gradients, and the choice and launch of all kernels.
#include <algorithm>

#include "depthwise_finish.cuh"
#include "launch.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kGroup = 8;  // rows of threads that share a sum

// Finds the rows that an output site reads, for a kernel and a tile of any size.
struct Sites {
  // A place along an axis of a neighbourhood of tiles: in which tile, and what it adds to the nested index there.
  struct Place {
    int tile, part;
  };

  const int32_t* table;
  NestedOrder order;
  Sizes3 span, kernel;

  explicit Sites(const DepthwiseGeometry& g) : table(g.table), order(g.tile), span(g.span), kernel(g.kernel) {}

  __device__ int taps() const { return static_cast<int>(volume(kernel)); }

  // Returns where a tap leads along an axis from a position in a tile.
  __device__ Place place(int axis, int position, int tap) const {
    const int side = order.side[axis], at = position + tap - kernel[axis] / 2 + span[axis] / 2 * side;
    return {at / side, order.part(axis, at % side)};
  }

  // Returns the row at these places of the neighbourhood of a tile, -1 if it is masked.
  __device__ int64_t row(int64_t tile, Place z, Place y, Place x) const {
    const int64_t neighbour = ((tile * span[0] + z.tile) * span[1] + y.tile) * span[2] + x.tile;
    return table[neighbour] < 0 ? -1 : int64_t{table[neighbour]} * order.sites() + z.part + y.part + x.part;
  }

  // Calls f(tap, row) for every tap through which a row reads a visible one.
  template <class F>
  __device__ void for_taps(int64_t reader, const F& f) const {
    const int64_t tile = reader / order.sites();
    const int index = static_cast<int>(reader % order.sites());
    const int at_z = order.position(0, index), at_y = order.position(1, index), at_x = order.position(2, index);
    for (int kz = 0, tap = 0; kz < kernel[0]; ++kz) {
      const Place z = place(0, at_z, kz);
      for (int ky = 0; ky < kernel[1]; ++ky) {
        const Place y = place(1, at_y, ky);
        for (int kx = 0; kx < kernel[2]; ++kx, ++tap) {
          const int64_t from = row(tile, z, y, place(2, at_x, kx));
          if (from >= 0) f(tap, from);
        }
      }
    }
  }

  // Returns the row that a row reads through a tap, -1 if it is masked.
  __device__ int64_t read_by(int64_t reader, int tap) const {
    const int index = static_cast<int>(reader % order.sites());
    const Place z = place(0, order.position(0, index), tap / kernel[2] / kernel[1]);
    const Place y = place(1, order.position(1, index), tap / kernel[2] % kernel[1]);
    return row(reader / order.sites(), z, y, place(2, order.position(2, index), tap % kernel[2]));
  }
};

// A thread computes a pack of channels of a row, or one channel where packs do not fit.
template <class T, class Move>
__global__ void __launch_bounds__(256)
    depthwise_general_kernel(const ConvArguments<T> a, const Sites sites, int64_t rows) {
  const int parts = a.channels / Move::kValues, taps = sites.taps();
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * parts; i += step) {
    const int64_t row = i / parts;
    const int channel = static_cast<int>(i % parts) * Move::kValues;
    float sums[Move::kValues];
#pragma unroll
    for (int k = 0; k < Move::kValues; ++k) sums[k] = a.bias != nullptr ? a.bias[channel + k] : 0.0f;
    sites.for_taps(row, [&](int tap, int64_t from) {
      const Pack<T> values = Move::load(a.x + from * a.channels + channel);
      const T* weight = a.weight + int64_t{channel} * taps + (a.flip ? taps - 1 - tap : tap);
#pragma unroll
      for (int k = 0; k < Move::kValues; ++k) {
        sums[k] = fmaf(widen(values.at[k]), widen(weight[int64_t{k} * taps]), sums[k]);
      }
    });
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
    depthwise_general_grad_kernel(const WeightGradArguments<T> a, const Sites sites, int64_t rows, int64_t per_range) {
  const int taps = sites.taps(), tap = blockIdx.x % (taps + 1);
  const int channel = blockIdx.x / (taps + 1) * kLanes + threadIdx.x % kLanes;
  const int64_t begin = blockIdx.y * per_range, end = min(begin + per_range, rows);
  float sum = 0.0f;
  if (channel < a.channels) {
    for (int64_t row = begin + threadIdx.x / kLanes; row < end; row += kGroup) {
      const float grad = widen(a.grad[row * a.channels + channel]);
      if (tap == taps) {
        sum += grad;
      } else {
        const int64_t from = sites.read_by(row, tap);
        if (from >= 0) sum = fmaf(grad, widen(a.x[from * a.channels + channel]), sum);
      }
    }
  }
  sum = column_sum(sum);
  if (threadIdx.x < kLanes && channel < a.channels) {
    a.partial[(int64_t{blockIdx.y} * (taps + 1) + tap) * a.channels + channel] = sum;
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

// Returns whether there are kernels for this size alone: a square kernel on square tiles of two axes.
bool specialised(const DepthwiseGeometry& g) {
  const int size = g.kernel[2];
  const bool flat = g.tile[0] == 1 && g.kernel[0] == 1;
  return flat && g.tile[1] == g.tile[2] && g.kernel[1] == size && (size == 3 || size == 5 || size == 7);
}

// Returns these kernels for the largest squares that a tile is divided into.
template <class T>
SquareKernels<T> square_kernels(const DepthwiseGeometry& g) {
  int side = 8;
  while (g.tile[2] % side != 0) side /= 2;
  return side >= 4 ? halo_kernels<T>(g.kernel[2], side) : window_kernels<T>(g.kernel[2], side);
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
         dim3(256), 0, stream, arguments, Sites(job.geometry), rows);
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
    const int64_t blocks = blocks_of(g.channels, kLanes) * (volume(g.kernel) + 1);
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
  const int taps = static_cast<int>(volume(g.kernel));
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
             bytes, stream, grad_arguments<T>(job, 1), Sites(g), g.rows(),
             blocks_of(std::max<int64_t>(g.rows(), 1), job.ranges));
    }
    launch("add_up_ranges_kernel", add_up_ranges_kernel<T>, sums, threads, bytes, stream, job.partial, job.ranges, taps,
           g.channels, static_cast<T*>(job.grad_weight), job.grad_bias);
  });
}

}  // namespace sparsecnx::cuda
