// The device and the stream that torch works on. The emulator of the tests has an implementation of its own.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace sparsecnx::cuda {

using torch::stable::Tensor;

// Returns torch's current stream on the device of a tensor.
cudaStream_t current_stream(const Tensor& x);

// Makes the device of a tensor the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x);
  ~OnDevice();

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace sparsecnx::cuda
