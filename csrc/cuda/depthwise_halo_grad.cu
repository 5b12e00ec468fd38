// Weight gradient of the depthwise convolution over squares of 8 x 8 and 4 x 4 sites.
#include "depthwise_halo.cuh"
#include "depthwise_launch.cuh"

namespace sparsecnx::cuda {
namespace {

template <class T, int K, int S>
void run(const DepthwiseWeightGrad& job, Device device, cudaStream_t stream) {
  launch_weight_grad<T, HaloGradMemory<T, K, S>>("depthwise_halo_grad_kernel", depthwise_halo_grad_kernel<T, K, S>, job,
                                                 S, device, stream);
}

}  // namespace

void depthwise_halo_grad(const DepthwiseWeightGrad& job, int side, Device device, cudaStream_t stream) {
  for_dtype(job.geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(job.geometry.kernel_h, [&](auto size) {
      side == 8 ? run<T, size(), 8>(job, device, stream) : run<T, size(), 4>(job, device, stream);
    });
  });
}

}  // namespace sparsecnx::cuda
