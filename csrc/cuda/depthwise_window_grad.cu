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

template <class T, int K, int S>
int64_t ranges(const DepthwiseGeometry& geometry, Device device) {
  return weight_grad_ranges<T, WindowMemory<T, K, S>>(geometry, S, kSquaresAtOnce<S>, device);
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

int64_t depthwise_window_ranges(const DepthwiseGeometry& geometry, int side, Device device) {
  int64_t found = 0;
  for_dtype(geometry.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_kernel(geometry.kernel_h, [&](auto size) {
      found = side == 2 ? ranges<T, size(), 2>(geometry, device) : ranges<T, size(), 1>(geometry, device);
    });
  });
  return found;
}

}  // namespace sparsecnx::cuda
