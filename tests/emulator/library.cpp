// Gives the GPU operators what they need of torch on the CPU: memory and, instead of csrc/cuda/stream.cpp, a stream. The
// memory that they allocate ends where nothing may be read and is full of NaN, so that values which a kernel leaves out
// are noticed.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "stream.h"

extern "C" void* emulator_allocate(size_t bytes, unsigned char poison);
extern "C" void emulator_release(void* start);

// The linker prefers this function to torch's own of the same name, so that csrc/cuda/library.cpp allocates with it.
AOTITorchError aoti_torch_aten_new_empty(AtenTensorHandle, const int64_t* size, int64_t dims, int32_t* dtype,
                                         int32_t* layout, int32_t* device, int32_t device_index, int32_t*,
                                         AtenTensorHandle* result) {
  std::vector<int64_t> strides(dims);
  int64_t numel = 1;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    strides[dim] = numel;
    numel *= size[dim];
  }
  const bool floating =
      *dtype != aoti_torch_dtype_int32() && *dtype != aoti_torch_dtype_int64() && *dtype != aoti_torch_dtype_bool();
  const unsigned char poison = floating ? 0xff : 0x55;  // as an integer 0xff is -1, which tables are full of
  void* data = emulator_allocate(numel * aoti_torch_dtype_element_size(*dtype), poison);
  const auto release = [](void* start, void*) { emulator_release(start); };
  return torch_from_blob(data, dims, size, strides.data(), 0, *dtype, *device, device_index, result, *layout, nullptr,
                         0, release, nullptr);
}

namespace sparsecnx::cuda {

cudaStream_t current_stream(const Tensor&) { return nullptr; }

OnDevice::OnDevice(const Tensor&) : guard_(nullptr) {}

OnDevice::~OnDevice() {}

}  // namespace sparsecnx::cuda
