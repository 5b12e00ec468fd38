// Divides the work of a depthwise convolution into blocks and launches the kernels.
#pragma once

#include <algorithm>

#include "depthwise_finish.cuh"
#include "launch.cuh"

namespace sparsecnx::cuda {

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

// The blocks of warps that share nothing. `Memory` is a warp's shared memory; the registers of a multiprocessor allow
// `most` blocks.
template <class Memory>
struct Blocks {
  int64_t warps, bytes, resident;

  Blocks(Device device, int64_t most)
      : warps(std::min<int64_t>(kThreads / kLanes, (device.shared_bytes - Memory::kBlockBytes) / sizeof(Memory))),
        bytes(warps * sizeof(Memory) + Memory::kBlockBytes),
        resident(device.resident(most, bytes)) {}
};

// Returns the side of the squares that a tile is divided into.
inline int square_side(int tile) {
  int side = 8;
  while (tile % side != 0) side /= 2;
  return side;
}

// Returns whether a kernel size has kernels of its own.
inline bool specialised(int kernel_h, int kernel_w) {
  return kernel_h == kernel_w && (kernel_h == 3 || kernel_h == 5 || kernel_h == 7);
}

// Returns whether rows of `channels` values at these addresses can be moved 16 bytes at a time.
inline bool in_packs(int channels, Dtype dtype, std::initializer_list<const void*> pointers) {
  bool aligned = channels * size_of(dtype) % 16 == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// Returns how many squares each worker takes in turn, at most `most`, so that there are `waves` of `resident` workers.
inline int squares_each(int64_t squares, int64_t resident, int64_t waves, int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(squares / (resident * waves), 1, most));
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
          in_packs(g.channels, g.dtype, {job.x, job.out})};
}

// Launches a kernel of depthwise_halo.cu or depthwise_window.cu. Its warps take up to `most` squares in turn, but so
// few that multiprocessors have work for two rounds.
template <class T, class Memory, class Kernel>
void launch_conv(const char* name, Kernel kernel, const DepthwiseConv& job, int side, int64_t most, Device device,
                 cudaStream_t stream) {
  const int64_t squares = Squares(job.geometry, side).count;
  const int64_t slabs = blocks_of(job.geometry.channels, Memory::kChannels);
  if (job.rstd != nullptr) {
    // The warps of a block share its squares. There are as many warps as slabs, or an equal part of them.
    const int64_t shared = Memory::kOutputs * sizeof(float2) + Memory::kBlockBytes;
    const int64_t each_warp = sizeof(Memory) + Memory::kOutputs * sizeof(Moments);
    const int64_t fit = std::min<int64_t>(kMostWarps<T>, (device.shared_bytes - shared) / each_warp);
    const int64_t warps = blocks_of(slabs, blocks_of(slabs, fit)), bytes = warps * each_warp + shared;
    const int64_t blocks = device.processors * device.resident(kMostWarps<T> / warps, bytes);
    const int each = squares_each(squares, blocks, 2, most);
    launch(name, kernel, dim3(blocks_of(squares, each)), dim3(warps * kLanes), bytes, stream,
           conv_arguments<T>(job, side, each));
  } else {
    const Blocks<Memory> blocks(device, kMostWarps<T> * kLanes / kThreads);
    const int64_t resident = device.processors * blocks.resident * blocks.warps;
    const int each = squares_each(squares * slabs, resident, 2, most);
    launch(name, kernel, dim3(blocks_of(squares, blocks.warps * each), slabs), dim3(blocks.warps * kLanes),
           blocks.bytes, stream, conv_arguments<T>(job, side, each));
  }
}

// Returns the number of ranges of the weight gradient: one wave of blocks. Each warp takes its squares in at least two
// turns of `at_once`, so that there are few partial sums compared with rows.
template <class T, class Memory>
int64_t weight_grad_ranges(const DepthwiseGeometry& g, int side, int64_t at_once, Device device) {
  const Blocks<Memory> blocks(device, kGradBlocks<T>);
  const int64_t slabs = blocks_of(g.channels, Memory::kChannels), squares = Squares(g, side).count;
  const int64_t most = std::max<int64_t>(1, squares / (2 * at_once * blocks.warps));
  return std::clamp<int64_t>(device.processors * blocks.resident / slabs, 1, most);
}

template <class T, class Memory, class Kernel>
void launch_weight_grad(const char* name, Kernel kernel, const DepthwiseWeightGrad& job, int side, Device device,
                        cudaStream_t stream) {
  const DepthwiseGeometry& g = job.geometry;
  const Squares squares(g, side);
  const Blocks<Memory> blocks(device, kGradBlocks<T>);
  const WeightGradArguments<T> arguments{static_cast<const T*>(job.grad),
                                         static_cast<const T*>(job.x),
                                         job.partial,
                                         squares,
                                         g.channels,
                                         static_cast<int>(std::max<int64_t>(1, blocks_of(squares.count, job.ranges))),
                                         in_packs(g.channels, g.dtype, {job.grad, job.x})};
  launch(name, kernel, dim3(job.ranges, blocks_of(g.channels, Memory::kChannels)), dim3(blocks.warps * kLanes),
         blocks.bytes, stream, arguments);
}

// Calls f(integral_constant<int, K>) for a specialised kernel size.
template <class F>
void for_kernel(int size, const F& f) {
  switch (size) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 7:
      return f(std::integral_constant<int, 7>());
  }
}

// These are defined in the files of the same name.
void depthwise_halo(const DepthwiseConv& job, int side, Device device, cudaStream_t stream);
void depthwise_window(const DepthwiseConv& job, int side, Device device, cudaStream_t stream);
void depthwise_halo_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream);
void depthwise_window_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream);
int64_t depthwise_halo_ranges(const DepthwiseGeometry& geometry, int side, Device device);
int64_t depthwise_window_ranges(const DepthwiseGeometry& geometry, int side, Device device);

}  // namespace sparsecnx::cuda
