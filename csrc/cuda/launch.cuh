// Every kernel is launched through this file, which checks every status.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparsecnx::cuda {

// Raises with the name of the attempt if CUDA reports an error.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("sparsecnx: ") + what + ": " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
  }
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes of shared memory that every kernel may use

// Returns the bytes of shared memory that a block may use on the current device if it asks.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a block");
  return bytes;
}

// Launches kernel(arguments...) in a stream. A grid without blocks launches nothing.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kSharedWithoutAsking) {
    // The limit belongs to the kernel, not to this launch. It is always the same, since another thread may launch too.
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most_shared_bytes()),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace sparsecnx::cuda
