// Depthwise convolution of squares of 2 x 2 and 1 x 1 sites.
#include "depthwise_launch.cuh"
#include "depthwise_window.cuh"

namespace sparsecnx::cuda {
namespace {

template <class T, int K, int S>
void run(const DepthwiseConv& job, Device device, cudaStream_t stream) {
  launch_conv<T, WindowMemory<T, K, S>>("depthwise_window_kernel", depthwise_window_kernel<T, K, S>, job, S,
                                        kSquaresAtOnce<S>, device, stream);
}

}  // namespace

void depthwise_window(const DepthwiseConv& job, int side, Device device, cudaStream_t stream) {
  for_dtype(job.geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(job.geometry.kernel_h, [&](auto size) {
      side == 2 ? run<T, size(), 2>(job, device, stream) : run<T, size(), 1>(job, device, stream);
    });
  });
}

}  // namespace sparsecnx::cuda
