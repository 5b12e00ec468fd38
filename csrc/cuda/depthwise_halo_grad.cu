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

template <class T, int K, int S>
int64_t ranges(const DepthwiseGeometry& geometry, Device device) {
  return weight_grad_ranges<T, HaloGradMemory<T, K, S>>(geometry, S, 1, device);
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

int64_t depthwise_halo_ranges(const DepthwiseGeometry& geometry, int side, Device device) {
  int64_t found = 0;
  for_dtype(geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(geometry.kernel_h, [&](auto size) {
      found = side == 8 ? ranges<T, size(), 8>(geometry, device) : ranges<T, size(), 4>(geometry, device);
    });
  });
  return found;
}

}  // namespace sparsecnx::cuda
