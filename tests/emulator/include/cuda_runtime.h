// Twin of CUDA's header for the emulator: what kernels are written in. A block's threads are fibers on one CPU
// thread (see emulator.cpp), so plain variables can hold the indices of the one that runs.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// `extern __shared__ uint4 sparsecnx_shared_memory[];`, as types.cuh has it, declares a function that returns a
// pointer to an array, and a use of the name calls it: so the emulator can place the memory of each block such that it
// ends where nothing may be read.
#define sparsecnx_shared_memory (*emulator_shared_memory())

struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
namespace sparsecnx::cuda {
uint4 (*emulator_shared_memory())[];
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

// The place in the sources where a thread waits.
struct Place {
  const char* file;
  int line;
};

enum class Call { kSyncThreads, kSyncWarp, kBallot, kShuffle, kShuffleXor };

// One lane's part in a call that all lanes in `mask` make together.
struct WarpCall {
  Call call;
  unsigned mask;
  uint64_t value;
  int operand, width;
  Place place;
};

void sync_threads(Place place);
uint64_t meet_in_warp(const WarpCall& call);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* state);

template <class T>
  requires(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8))
T shuffle(Call call, unsigned mask, T value, int operand, int width, Place place) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_in_warp({call, mask, bits, operand, width, place});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

// Parameters beyond CUDA's name the line of the call.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(EMULATOR_PLACE) { emulator::sync_threads({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_PLACE) {
  emulator::meet_in_warp({emulator::Call::kSyncWarp, mask, 0, 0, warpSize, {file, line}});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return static_cast<unsigned>(emulator::meet_in_warp(
      {emulator::Call::kBallot, mask, static_cast<uint64_t>(predicate != 0), 0, warpSize, {file, line}}));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Call::kShuffle, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Call::kShuffleXor, mask, value, bits, width, {file, line});
}
#undef EMULATOR_PLACE

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// As in CUDA's overloads, arguments of different types are converted as in a + b.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// As in CUDA, a kernel's arguments are converted to its parameters. Every thread gets its own.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  const auto body = [&] { std::apply(kernel, values); };
  using Body = decltype(body);
  return emulator::launch(
      *config, reinterpret_cast<const void*>(kernel), [](void* state) { (*static_cast<Body*>(state))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* function, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}
