// Kernels of tests/test_emulator.py: some are right, some wrong in the one way that their name says.
#include <cuda_pipeline.h>

#include <map>
#include <string>

#include "launch.cuh"
#include "types.cuh"

namespace sparsecnx::cuda {
namespace {

using Kernel = void(const float* in, float* out, int argument);

__device__ int index_in_block() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ int threads_of_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

__device__ int index_in_grid() {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  return static_cast<int>(block) * threads_of_block() + index_in_block();
}

// out[i] = i, from all the indices there are.
__global__ void indices(const float*, float* out, int) { out[index_in_grid()] = static_cast<float>(index_in_grid()); }

// Each block's values in reverse.
template <bool kBarrier>
__global__ void reverse(const float* in, float* out, int) {
  float* shared = shared_memory<float>();
  const int index = index_in_block(), threads = threads_of_block();
  shared[index] = in[index_in_grid()];
  if (kBarrier) __syncthreads();
  out[index_in_grid()] = shared[threads - 1 - index];
}

// The value of the thread before. Without a barrier it is there whenever threads run in ascending order.
__global__ void previous_without_barrier(const float* in, float* out, int) {
  float* shared = shared_memory<float>();
  const int index = index_in_block();
  shared[index] = in[index_in_grid()];
  out[index_in_grid()] = index == 0 ? 0 : shared[index - 1];
}

// Values move on by one thread, `steps` times. The second barrier keeps those that write from those that still read.
template <bool kBarrier>
__global__ void rotate(const float* in, float* out, int steps) {
  float* shared = shared_memory<float>();
  const int index = index_in_block(), threads = threads_of_block();
  float value = in[index_in_grid()];
  for (int step = 0; step < steps; ++step) {
    shared[index] = value;
    __syncthreads();
    value = shared[(index + 1) % threads];
    if (kBarrier) __syncthreads();
  }
  out[index_in_grid()] = value;
}

// What the block before left in shared memory is not for this one.
__global__ void read_what_nobody_wrote(const float*, float* out, int) {
  float* shared = shared_memory<float>();
  out[index_in_grid()] = shared[index_in_block()];
  shared[index_in_block()] = 1;
}

// Only the first half of the threads reaches the barrier; the others have ended, which CUDA allows.
__global__ void end_before_the_barrier(const float* in, float* out, int) {
  if (index_in_block() >= threads_of_block() / 2) return;
  float* shared = shared_memory<float>();
  shared[index_in_block()] = in[index_in_grid()];
  __syncthreads();
  out[index_in_grid()] = shared[threads_of_block() / 2 - 1 - index_in_block()];
}

__global__ void barrier_in_two_branches(const float* in, float* out, int) {
  if (index_in_block() < 40) {
    __syncthreads();
    out[index_in_grid()] = in[index_in_grid()];
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_shuffle(const float* in, float* out, int) {
  float value = in[index_in_grid()];
  if (index_in_block() == 5) {
    __syncthreads();
  } else {
    value = __shfl_xor_sync(0xffffffff, value, 1);
  }
  out[index_in_grid()] = value;
}

__global__ void write_at(const float*, float*, int byte) {
  if (index_in_block() == 3) reinterpret_cast<char*>(shared_memory<float>())[byte] = 1;
}

__global__ void read_at(const float*, float* out, int byte) { out[index_in_grid()] = shared_memory<float>()[byte / 4]; }

__global__ void read_global_at(const float* in, float* out, int index) { out[index_in_grid()] = in[index]; }

__global__ void write_global_at(const float* in, float*, int index) { const_cast<float*>(in)[index] = 1; }

__global__ void read_16_bytes_at(const float* in, float* out, int index) {
  const uint4 bits = *reinterpret_cast<const uint4*>(in + index);
  *reinterpret_cast<uint4*>(out + 4 * index_in_grid()) = bits;
}

__global__ void read_local_at(const float* in, float* out, int index) {
  float local[4] = {in[0], in[1], in[2], in[3]};
  out[index_in_grid()] = local[index];
}

__global__ void overflow_an_int(const float*, float* out, int value) {
  out[index_in_grid()] = static_cast<float>(value * value);
}

__global__ void too_many_locals(const float* in, float* out, int size) {
  volatile char local[300 * 1024];
  for (int at = size - 1; at >= 0; --at) local[at] = static_cast<char>(in[0]);
  out[index_in_grid()] = local[size / 2];
}

// Two batches of asynchronous copies, of which `left` are not waited for.
__global__ void copy_async(const float* in, float* out, int left) {
  float* shared = shared_memory<float>();
  const int index = index_in_block(), threads = threads_of_block();
  for (int batch = 0; batch < 2; ++batch) {
    const int at = batch * threads + index;
    __pipeline_memcpy_async(shared + at, in + at, 4);
    __pipeline_commit();
  }
  if (left == 0) __pipeline_wait_prior(0);
  if (left == 1) __pipeline_wait_prior(1);
  __syncthreads();
  for (int batch = 0; batch < 2; ++batch) out[batch * threads + index] = shared[batch * threads + threads - 1 - index];
}

// Copies of 16 bytes, the last `zeros` of them zeros.
__global__ void copy_with_zeros(const float* in, float* out, int zeros) {
  float* shared = shared_memory<float>();
  const int index = index_in_block();
  __pipeline_memcpy_async(shared + 4 * index, in + 4 * index, 16, static_cast<size_t>(zeros));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  for (int value = 0; value < 4; ++value) out[4 * index + value] = shared[4 * index + value];
}

__global__ void copy_to_where_others_read(const float* in, float* out, int) {
  float* shared = shared_memory<float>();
  const int index = index_in_block(), threads = threads_of_block();
  shared[index] = in[index];
  __syncthreads();
  const float value = shared[threads - 1 - index];
  __pipeline_memcpy_async(shared + index, in + index, 4);  // too early: nothing says that all have read
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[index] = value;
}

__global__ void copy_bytes(const float* in, float*, int size) {
  __pipeline_memcpy_async(shared_memory<float>(), in, static_cast<size_t>(size));
}
__global__ void copy_misaligned(const float* in, float*, int) {
  __pipeline_memcpy_async(shared_memory<float>(), in + 1, 8);
}
__global__ void copy_past_the_end(const float* in, float*, int at) {
  __pipeline_memcpy_async(shared_memory<float>() + at, in, 8);
}

// Of every shuffle, 32 results for each warp.
__global__ void shuffles(const float* in, float* out, int width) {
  const int index = index_in_block(), threads = threads_of_block();
  const float value = in[index];
  out[index] = __shfl_sync(0xffffffff, value, 3, width);
  out[threads + index] = __shfl_up_sync(0xffffffff, value, 2, width);
  out[2 * threads + index] = __shfl_down_sync(0xffffffff, value, 2, width);
  out[3 * threads + index] = __shfl_xor_sync(0xffffffff, value, 5, width);
  out[4 * threads + index] = static_cast<float>(__popc(__ballot_sync(0xffffffff, value > 0)));
}

__global__ void sum_by_shuffles(const float* in, float* out, int) {
  float sum = in[index_in_grid()];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  out[index_in_grid()] = sum;
}

// Two halves of a warp exchange values apart, each under its own mask.
__global__ void shuffle_in_halves(const float* in, float* out, int) {
  const float value = in[index_in_grid()];
  float other;
  if (index_in_block() % 32 < 16) {
    other = __shfl_xor_sync(0x0000ffff, value, 1);
  } else {
    other = __shfl_xor_sync(0xffff0000, value, 2);
  }
  __syncwarp();
  out[index_in_grid()] = other;
}

__global__ void shuffle_outside_the_mask(const float* in, float* out, int mask) {
  out[index_in_grid()] = __shfl_sync(static_cast<unsigned>(mask), in[index_in_grid()], 0);
}
__global__ void shuffle_from_outside_the_mask(const float* in, float* out, int) {
  if (index_in_block() < 16) out[index_in_grid()] = __shfl_xor_sync(0xffff, in[index_in_grid()], 16);
}
__global__ void shuffle_with_the_ended(const float* in, float* out, int lane) {
  if (index_in_block() == lane) return;
  out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
}
__global__ void shuffle_at_two_places(const float* in, float* out, int) {
  if (index_in_block() % 2 == 0) {
    out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
  } else {
    out[index_in_grid()] = __shfl_xor_sync(0xffffffff, in[index_in_grid()], 1);
  }
}

// in holds bit patterns of 16 bits, out the values and what they are rounded to again.
__global__ void widen_and_narrow(const float* in, float* out, int halves) {
  const int index = index_in_grid();
  const auto convert = [&](auto* values, auto* narrowed) {
    out[index] = widen(values[index]);
    narrowed[index] = narrow<std::remove_pointer_t<decltype(narrowed)>>(out[index]);
  };
  float* behind = out + gridDim.x * blockDim.x;
  if (halves != 0) {
    convert(reinterpret_cast<const __half*>(in), reinterpret_cast<__half*>(behind));
  } else {
    convert(reinterpret_cast<const __nv_bfloat16*>(in), reinterpret_cast<__nv_bfloat16*>(behind));
  }
}

__global__ void narrow_all(const float* in, float* out, int halves) {
  const int index = index_in_grid();
  if (halves != 0) {
    reinterpret_cast<__half*>(out)[index] = narrow<__half>(in[index]);
  } else {
    reinterpret_cast<__nv_bfloat16*>(out)[index] = narrow<__nv_bfloat16>(in[index]);
  }
}

// Counts of all threads, by integer atomics.
__global__ void count(const float*, float* out, int amount) { atomicAdd(reinterpret_cast<int*>(out), amount); }

const std::map<std::string, Kernel*> kKernels = {
    {"indices", indices},
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"previous_without_barrier", previous_without_barrier},
    {"rotate", rotate<true>},
    {"rotate_without_barrier", rotate<false>},
    {"read_what_nobody_wrote", read_what_nobody_wrote},
    {"end_before_the_barrier", end_before_the_barrier},
    {"barrier_in_two_branches", barrier_in_two_branches},
    {"barrier_against_shuffle", barrier_against_shuffle},
    {"write_at", write_at},
    {"read_at", read_at},
    {"read_global_at", read_global_at},
    {"write_global_at", write_global_at},
    {"read_16_bytes_at", read_16_bytes_at},
    {"read_local_at", read_local_at},
    {"overflow_an_int", overflow_an_int},
    {"too_many_locals", too_many_locals},
    {"copy_async", copy_async},
    {"copy_with_zeros", copy_with_zeros},
    {"copy_to_where_others_read", copy_to_where_others_read},
    {"copy_bytes", copy_bytes},
    {"copy_misaligned", copy_misaligned},
    {"copy_past_the_end", copy_past_the_end},
    {"shuffles", shuffles},
    {"sum_by_shuffles", sum_by_shuffles},
    {"shuffle_in_halves", shuffle_in_halves},
    {"shuffle_outside_the_mask", shuffle_outside_the_mask},
    {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask},
    {"shuffle_with_the_ended", shuffle_with_the_ended},
    {"shuffle_at_two_places", shuffle_at_two_places},
    {"widen_and_narrow", widen_and_narrow},
    {"narrow_all", narrow_all},
    {"count", count},
};

}  // namespace
}  // namespace sparsecnx::cuda

// Launches a kernel by its name; null, or what went wrong. Without `ask` not through launch(), which asks for as much
// shared memory as it needs.
extern "C" [[gnu::visibility("default")]] const char* run_check(const char* name, const unsigned* grid,
                                                                const unsigned* block, size_t shared_bytes, bool ask,
                                                                const float* in, float* out, int argument) {
  using namespace sparsecnx::cuda;
  static std::string error;
  const dim3 blocks(grid[0], grid[1], grid[2]), threads(block[0], block[1], block[2]);
  try {
    Kernel* const kernel = kKernels.at(name);
    if (ask) {
      launch(name, kernel, blocks, threads, shared_bytes, nullptr, in, out, argument);
    } else {
      const cudaLaunchConfig_t config{blocks, threads, shared_bytes, nullptr, nullptr, 0};
      check(cudaLaunchKernelEx(&config, kernel, in, out, argument), name);
    }
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}
