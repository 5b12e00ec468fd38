// What the bindings and the kernels both know. Neither torch nor CUDA's device code is needed to read it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sparsecnx::cuda {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Blocks of `size` that cover `count`.
constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace sparsecnx::cuda
