// Storage types of features on the GPU. All arithmetic is float32; rows are moved 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "depthwise.h"

namespace sparsecnx::cuda {

inline __device__ float widen(float x) { return x; }
inline __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float widen(__half x) { return __half2float(x); }

// Rounds to the nearest value of T, ties to even.
template <class T>
__device__ T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Values that move together: 16 bytes at a multiple of 16 bytes.
template <class T>
union alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;
  T at[kSize];
};

// Moves a pack in one access, which copying the union does not guarantee.
template <class T>
__device__ Pack<T> load_pack(const T* from) {
  Pack<T> pack;
  pack.bits = *reinterpret_cast<const uint4*>(from);
  return pack;
}
template <class T>
__device__ void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(to) = pack.bits;
}

// Returns f(Tag<T>()) for the storage type of a dtype.
template <class T>
struct Tag {};
template <class F>
auto for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Tag<float>());
    case Dtype::kBFloat16:
      return f(Tag<__nv_bfloat16>());
    default:
      return f(Tag<__half>());
  }
}

// Returns the block's dynamic shared memory, which begins at a multiple of 16 bytes.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 sparsecnx_shared_memory[];
  return reinterpret_cast<T*>(sparsecnx_shared_memory);
}

}  // namespace sparsecnx::cuda
