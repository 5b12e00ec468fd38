// Weight gradient of the depthwise convolution over squares of 2 x 2 and 1 x 1 sites.
#include "depthwise_launch.cuh"
#include "depthwise_window.cuh"

namespace sparsecnx::cuda {
namespace {

template <class T, int K, int S>
void run(const DepthwiseWeightGrad& job, Device device, cudaStream_t stream) {
  launch_weight_grad<T, WindowMemory<T, K, S>>("depthwise_window_grad_kernel", depthwise_window_grad_kernel<T, K, S>,
                                               job, S, device, stream);
}

}  // namespace

void depthwise_window_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream) {
  for_dtype(job.geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(job.geometry.kernel_h, [&](auto size) {
      side == 2 ? run<T, size(), 2>(job, device, stream) : run<T, size(), 1>(job, device, stream);
    });
  });
}

}  // namespace sparsecnx::cuda
