// The GPU operators for tensors on the CPU, in the place of csrc/cuda/library.cpp and csrc/cuda/stream.cpp.
#include "implement.h"
#include "op.h"

namespace sparsecnx::cuda {

cudaStream_t current_stream(const Tensor&) { return nullptr; }

OnDevice::OnDevice(const Tensor&) : guard_(nullptr) {}

OnDevice::~OnDevice() {}

}  // namespace sparsecnx::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsecnx_cuda, CPU, m) { sparsecnx::cuda::implement(m); }
