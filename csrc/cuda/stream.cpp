#define USE_CUDA  // torch's own name: declares the CUDA part of the C interface
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#undef USE_CUDA
#include <torch/headeronly/util/shim_utils.h>

#include "stream.h"

namespace sparsecnx::cuda {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

OnDevice::OnDevice(const Tensor& x)
    : guard_(std::make_unique<torch::stable::accelerator::DeviceGuard>(x.get_device_index())) {}

OnDevice::~OnDevice() = default;

}  // namespace sparsecnx::cuda
