// Kernels of tests/test_emulator.py. Some are right, others are wrong in the one way that their name says.
#include <cuda_pipeline.h>

#include <map>
#include <string>

#include "launch.cuh"
#include "types.cuh"

namespace sparsecnx::cuda {
namespace {

using Kernel = void(const float* in, float* out, int argument);

__device__ int index_in_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// Values move on by one thread, `steps` times. The second barrier separates the threads that write from those that
// read.
template <bool kBarrier>
__global__ void rotate(const float* in, float* out, int steps) {
  float* shared = shared_memory<float>();
  float value = in[index_in_grid()];
  for (int step = 0; step < steps; ++step) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[(threadIdx.x + 1) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  out[index_in_grid()] = value;
}

// Reads the value of the thread before. Without a barrier it is there whenever threads run in ascending order.
__global__ void previous_without_barrier(const float* in, float* out, int) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[index_in_grid()];
  out[index_in_grid()] = threadIdx.x == 0 ? 0 : shared[threadIdx.x - 1];
}

__global__ void barrier_in_two_branches(const float* in, float* out, int) {
  if (threadIdx.x < 40) {
    __syncthreads();
    out[index_in_grid()] = in[index_in_grid()];
  } else {
    __syncthreads();
  }
}

__global__ void sum_by_shuffles(const float* in, float* out, int) {
  float sum = in[index_in_grid()];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  out[index_in_grid()] = sum;
}

__global__ void shuffle_from_outside_the_mask(const float* in, float* out, int) {
  if (threadIdx.x < 16) out[index_in_grid()] = __shfl_xor_sync(0xffff, in[index_in_grid()], 16);
}

__global__ void shuffle_with_the_ended(const float* in, float* out, int lane) {
  if (static_cast<int>(threadIdx.x) == lane) return;
  out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
}

__global__ void shuffle_at_two_places(const float* in, float* out, int) {
  if (threadIdx.x % 2 == 0) {
    out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
  } else {
    out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
  }
}

__global__ void write_shared_at(const float*, float*, int byte) {
  if (threadIdx.x == 3) reinterpret_cast<char*>(shared_memory<float>())[byte] = 1;
}

__global__ void read_shared_at(const float*, float* out, int byte) {
  out[index_in_grid()] = shared_memory<float>()[byte / 4];
}

__global__ void read_at(const float* in, float* out, int index) { out[index_in_grid()] = in[index]; }

__global__ void write_at(const float* in, float*, int index) { const_cast<float*>(in)[index] = 1; }

__global__ void read_16_bytes_at(const float* in, float* out, int index) {
  out[index_in_grid()] = load_pack(in + index).at[0];
}

// Makes two batches of asynchronous copies and waits until `left` of them are left.
__global__ void copy_async(const float* in, float* out, int left) {
  float* shared = shared_memory<float>();
  for (unsigned batch = 0; batch < 2; ++batch) {
    const unsigned at = batch * blockDim.x + threadIdx.x;
    __pipeline_memcpy_async(shared + at, in + at, 4);
    __pipeline_commit();
  }
  __pipeline_wait_prior(left);
  __syncthreads();
  for (unsigned batch = 0; batch < 2; ++batch) {
    const unsigned first = batch * blockDim.x;
    out[first + threadIdx.x] = shared[first + blockDim.x - 1 - threadIdx.x];
  }
}

__global__ void copy_to_where_others_read(const float* in, float* out, int) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float value = shared[blockDim.x - 1 - threadIdx.x];
  __pipeline_memcpy_async(shared + threadIdx.x, in + threadIdx.x, 4);  // too early: others may not have read yet
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = value;
}

__global__ void copy_misaligned(const float* in, float*, int) {
  __pipeline_memcpy_async(shared_memory<float>(), in + 1, 8);
}

// `in` holds float32, `out` gets their neighbours in 16 bits.
template <class T>
__global__ void narrow_all(const float* in, float* out, int) {
  reinterpret_cast<T*>(out)[index_in_grid()] = narrow<T>(in[index_in_grid()]);
}

// `in` holds numbers of 16 bits, `out` gets them as float32.
template <class T>
__global__ void widen_all(const float* in, float* out, int) {
  out[index_in_grid()] = widen(reinterpret_cast<const T*>(in)[index_in_grid()]);
}

#define KERNEL(name) {#name, name}
const std::map<std::string, Kernel*> kKernels = {
    {"rotate", rotate<true>},
    {"rotate_without_barrier", rotate<false>},
    {"narrow_bfloat16", narrow_all<__nv_bfloat16>},
    {"narrow_float16", narrow_all<__half>},
    {"widen_bfloat16", widen_all<__nv_bfloat16>},
    {"widen_float16", widen_all<__half>},
    KERNEL(previous_without_barrier),
    KERNEL(barrier_in_two_branches),
    KERNEL(sum_by_shuffles),
    KERNEL(shuffle_from_outside_the_mask),
    KERNEL(shuffle_with_the_ended),
    KERNEL(shuffle_at_two_places),
    KERNEL(write_shared_at),
    KERNEL(read_shared_at),
    KERNEL(read_at),
    KERNEL(write_at),
    KERNEL(read_16_bytes_at),
    KERNEL(copy_async),
    KERNEL(copy_to_where_others_read),
    KERNEL(copy_misaligned),
};

}  // namespace
}  // namespace sparsecnx::cuda

// Launches a kernel by its name. Returns null or what went wrong.
extern "C" [[gnu::visibility("default")]] const char* run_check(const char* name, unsigned blocks, unsigned threads,
                                                                size_t shared_bytes, const float* in, float* out,
                                                                int argument) {
  using namespace sparsecnx::cuda;
  static std::string error;
  try {
    launch(name, kKernels.at(name), dim3(blocks), dim3(threads), shared_bytes, nullptr, in, out, argument);
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}
