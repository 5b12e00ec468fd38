// Depthwise convolution of squares of 8 x 8 and 4 x 4 sites.
#include "depthwise_halo.cuh"
#include "depthwise_launch.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int64_t kMost = 4;  // squares of a warp: its weights, loaded once, are then a small part of the work

template <class T, int K, int S>
void run(const DepthwiseConv& job, Device device, cudaStream_t stream) {
  launch_conv<T, HaloMemory<T, K, S>>("depthwise_halo_kernel", depthwise_halo_kernel<T, K, S>, job, S, kMost, device,
                                      stream);
}

}  // namespace

void depthwise_halo(const DepthwiseConv& job, int side, Device device, cudaStream_t stream) {
  for_dtype(job.geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(job.geometry.kernel_h, [&](auto size) {
      side == 8 ? run<T, size(), 8>(job, device, stream) : run<T, size(), 4>(job, device, stream);
    });
  });
}

}  // namespace sparsecnx::cuda
