// Depthwise convolution on the GPU: the choice of the kernel, the kernels for any kernel size, and the second stage of
// weight gradients.
#include "depthwise_launch.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kGroup = 8;  // rows of threads that share a sum

// Finds the rows that an output site reads, tap by tap, for a kernel of any size.
struct Taps {
  const int32_t* table;
  TileSide tile;
  int span, kernel_h, kernel_w;

  explicit Taps(const DepthwiseGeometry& g)
      : table(g.table), tile(g.tile), span(g.span), kernel_h(g.kernel_h), kernel_w(g.kernel_w) {}

  __host__ __device__ int count() const { return kernel_h * kernel_w; }

  // Returns the row that `row` reads through a tap, -1 if that site is masked.
  __device__ int64_t read_by(int64_t row, int tap) const {
    const int64_t index = row / tile.sites();
    const int site = static_cast<int>(row % tile.sites());
    const int y = site_line(tile, site) + tap / kernel_w - kernel_h / 2 + span / 2 * tile.side;
    const int x = site_column(tile, site) + tap % kernel_w - kernel_w / 2 + span / 2 * tile.side;
    const int32_t there = table[index * span * span + y / tile.side * span + x / tile.side];
    if (there < 0) return -1;
    return static_cast<int64_t>(there) * tile.sites() + nested_line(tile, y % tile.side) +
           nested_column(tile, x % tile.side);
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
      const int64_t from = taps.read_by(row, tap);
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
        const int64_t from = taps.read_by(row, tap);
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

template <class T, class Move>
void general(const DepthwiseConv& job, const ConvArguments<T>& arguments, Device device, cudaStream_t stream) {
  const int64_t rows = job.geometry.rows(), most = int64_t{16} * device.processors;
  const int64_t threads = rows * (job.geometry.channels / Move::kValues);
  launch("depthwise_general_kernel", depthwise_general_kernel<T, Move>, dim3(std::min(blocks_of(threads, 256), most)),
         dim3(256), 0, stream, arguments, Taps(job.geometry), rows);
  if (job.rstd != nullptr) {
    launch("normalise_rows_kernel", normalise_rows_kernel<T, Move>, dim3(std::min(blocks_of(rows, 8), most)), dim3(256),
           0, stream, arguments, rows);
  }
}

}  // namespace

void run_depthwise_conv(const DepthwiseConv& job, cudaStream_t stream) {
  const DepthwiseGeometry& g = job.geometry;
  const Device device = Device::current();
  const int side = square_side(g.tile);
  if (specialised(g.kernel_h, g.kernel_w)) {
    return side >= 4 ? depthwise_halo(job, side, device, stream) : depthwise_window(job, side, device, stream);
  }
  for_dtype(g.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ConvArguments<T> arguments = conv_arguments<T>(job, 1, 1);
    arguments.packs ? general<T, Sixteen<T>>(job, arguments, device, stream)
                    : general<T, Single<T>>(job, arguments, device, stream);
  });
}

int64_t depthwise_ranges(const DepthwiseGeometry& g) {
  const Device device = Device::current();
  const int side = square_side(g.tile);
  if (specialised(g.kernel_h, g.kernel_w)) {
    return side >= 4 ? depthwise_halo_ranges(g, side, device) : depthwise_window_ranges(g, side, device);
  }
  const int64_t blocks = blocks_of(g.channels, kLanes) * (g.kernel_h * g.kernel_w + 1);
  return std::clamp<int64_t>(8 * device.processors / blocks, 1, blocks_of(std::max<int64_t>(g.rows(), 1), 64));
}

void run_depthwise_weight_grad(const DepthwiseWeightGrad& job, cudaStream_t stream) {
  const DepthwiseGeometry& g = job.geometry;
  const Device device = Device::current();
  const int side = square_side(g.tile), taps = g.kernel_h * g.kernel_w;
  const dim3 sums(blocks_of(g.channels, kLanes) * (taps + 1)), threads(kGroup * kLanes);
  const size_t bytes = kGroup * kLanes * sizeof(float);
  if (specialised(g.kernel_h, g.kernel_w)) {
    side >= 4 ? depthwise_halo_grad(job, side, device, stream) : depthwise_window_grad(job, side, device, stream);
  }
  for_dtype(g.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!specialised(g.kernel_h, g.kernel_w)) {
      const WeightGradArguments<T> arguments{static_cast<const T*>(job.grad),
                                             static_cast<const T*>(job.x),
                                             job.partial,
                                             Squares(g, 1),
                                             g.channels,
                                             0,
                                             false};
      launch("depthwise_general_grad_kernel", depthwise_general_grad_kernel<T>, dim3(sums.x, job.ranges), threads,
             bytes, stream, arguments, Taps(g), g.rows(), blocks_of(std::max<int64_t>(g.rows(), 1), job.ranges));
    }
    launch("add_up_ranges_kernel", add_up_ranges_kernel<T>, sums, threads, bytes, stream, job.partial, job.ranges, taps,
           g.channels, static_cast<T*>(job.grad_weight), job.grad_bias);
  });
}

}  // namespace sparsecnx::cuda
