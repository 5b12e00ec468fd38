// Twin of CUDA's header for the emulator: asynchronous copies from global to shared memory. They write NaN at once, and
// what they copy when it is waited for.
#pragma once

#include <cuda_runtime.h>

namespace emulator {
void copy_async(void* shared, const void* global, size_t size, size_t zeros);
void commit_copies();
void wait_for_copies(size_t batches_left);
}  // namespace emulator

// The last `zeros` of the `size` bytes are not read: they become 0.
inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size, size_t zeros = 0) {
  emulator::copy_async(shared, global, size, zeros);
}
inline void __pipeline_commit() { emulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t batches_left) { emulator::wait_for_copies(batches_left); }
