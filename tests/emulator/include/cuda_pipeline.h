// Twin of CUDA's header for the emulator: asynchronous copies from global to shared memory. A copy writes NaN at
// once, and its values when the thread waits for it.
#pragma once

#include <cuda_runtime.h>

namespace emulator {
void copy_async(void* shared, const void* global, size_t size);
void commit_copies();
void wait_for_copies(size_t batches_left);
}  // namespace emulator

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size) {
  emulator::copy_async(shared, global, size);
}
inline void __pipeline_commit() { emulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t batches_left) { emulator::wait_for_copies(batches_left); }
