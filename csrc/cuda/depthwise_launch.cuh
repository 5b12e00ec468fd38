// How the work of a depthwise convolution is cut into blocks.
#pragma once

#include <algorithm>

#include "depthwise_conv.cuh"
#include "launch.cuh"

namespace sparsecnx::cuda {

// What matters of the current device.
struct Device {
  int processors;
  int64_t shared_bytes;  // that a block may use

  static Device current() {
    int device = 0, processors = 0, bytes = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    return {processors, bytes};
  }
};

// Side of the squares that tiles of a side are cut into.
inline int square_side(int tile) {
  int side = 8;
  while (tile % side != 0) side /= 2;
  return side;
}

// Kernel sizes that have kernels of their own.
inline bool specialised(int kernel_h, int kernel_w) {
  return kernel_h == kernel_w && (kernel_h == 3 || kernel_h == 5 || kernel_h == 7);
}

// Whether rows of `channels` values at these addresses can be moved 16 bytes at a time.
inline bool in_packs(int channels, Dtype dtype, std::initializer_list<const void*> pointers) {
  bool aligned = channels * size_of(dtype) % 16 == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// Squares one after another for each of `waves` of `resident` workers, but no more than `most`.
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

// Launches a kernel of depthwise_halo.cuh or depthwise_window.cuh, whose warps take up to `most` squares one after
// another. `Memory` is a warp's shared memory.
template <class T, class Memory, class Kernel>
void launch_conv(const char* name, Kernel kernel, const DepthwiseConv& job, int side, int64_t most, Device device,
                 cudaStream_t stream) {
  const int64_t squares = Squares(job.geometry, side).count;
  const int64_t slabs = blocks_of(job.geometry.channels, Memory::kChannels);
  const int64_t resident = kThreads / kLanes * kBlocks<T>;  // warps of a multiprocessor
  if (job.normalise) {
    // The warps of a block share its squares: as many as there are slabs, or an equal part of them.
    const int64_t shared = Memory::kOutputs * sizeof(float2) + Memory::kBlockBytes;
    const int64_t bytes = sizeof(Memory) + Memory::kOutputs * sizeof(Moments);
    const int64_t fit = std::min<int64_t>(kMostWarps<T>, (device.shared_bytes - shared) / bytes);
    const int64_t warps = blocks_of(slabs, blocks_of(slabs, fit));
    const int64_t blocks = device.processors * std::max<int64_t>(1, resident / warps);
    const int each = squares_each(squares, blocks, 2, most);
    launch(name, kernel, dim3(blocks_of(squares, each)), dim3(warps * kLanes), warps * bytes + shared, stream,
           conv_arguments<T>(job, side, each));
  } else {
    const int64_t warps =
        std::min<int64_t>(kThreads / kLanes, (device.shared_bytes - Memory::kBlockBytes) / sizeof(Memory));
    const int each = squares_each(squares * slabs, device.processors * resident, 2, most);
    launch(name, kernel, dim3(blocks_of(squares, warps * each), slabs), dim3(warps * kLanes),
           warps * sizeof(Memory) + Memory::kBlockBytes, stream, conv_arguments<T>(job, side, each));
  }
}

template <class T, class Memory, class Kernel>
void launch_weight_grad(const char* name, Kernel kernel, const DepthwiseWeightGrad& job, int side, Device device,
                        cudaStream_t stream) {
  const DepthwiseGeometry& g = job.geometry;
  const Squares squares(g, side);
  const int64_t warps =
      std::min<int64_t>(kThreads / kLanes, (device.shared_bytes - Memory::kBlockBytes) / sizeof(Memory));
  const WeightGradArguments<T> arguments{static_cast<const T*>(job.grad),
                                         static_cast<const T*>(job.x),
                                         job.partial,
                                         squares,
                                         g.channels,
                                         static_cast<int>(std::max<int64_t>(1, blocks_of(squares.count, job.ranges))),
                                         in_packs(g.channels, g.dtype, {job.grad, job.x})};
  launch(name, kernel, dim3(job.ranges, blocks_of(g.channels, Memory::kChannels)), dim3(warps * kLanes),
         warps * sizeof(Memory) + Memory::kBlockBytes, stream, arguments);
}

// f(integral_constant<int, K>) of a specialised kernel size.
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

// By the files named after them.
void depthwise_halo(const DepthwiseConv& job, int side, Device device, cudaStream_t stream);
void depthwise_window(const DepthwiseConv& job, int side, Device device, cudaStream_t stream);
void depthwise_halo_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream);
void depthwise_window_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream);

}  // namespace sparsecnx::cuda
