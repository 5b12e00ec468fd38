// What the torch bindings share: checks of arguments, allocation, the stream. PyTorch's ABI-stable headers alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "dtype.h"

namespace sparsecnx::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that torch works in on the device of a tensor. In stream.cpp.
cudaStream_t current_stream(const Tensor& x);

// Makes the device of a tensor the current one while it lives. In stream.cpp.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x);
  ~OnDevice();

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
};

constexpr int64_t kMostChannels = 1 << 16;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "sparsecnx: ", name, " is ", torch::headeronly::toString(x.scalar_type()),
                      ", expected float32, bfloat16 or float16");
  }
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline void* data(const Tensor& x) { return x.mutable_data_ptr(); }

inline const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->mutable_data_ptr() : nullptr; }

// Raises unless x is on the device of `like`.
inline void check_device(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), "sparsecnx: ", name, " is on device ", x.get_device_index(),
                  ", the first argument on device ", like.get_device_index());
}

inline void check_dtype(const Tensor& x, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, "sparsecnx: ", name, " is ",
                  torch::headeronly::toString(x.scalar_type()), ", expected ", torch::headeronly::toString(expected));
}

// Raises unless x is contiguous, of that many elements and that dtype, on the device of `like`.
inline void check_dense(const Tensor& x, const char* name, int64_t numel, ScalarType dtype, const Tensor& like) {
  check_device(x, name, like);
  check_dtype(x, name, dtype);
  STD_TORCH_CHECK(x.is_contiguous(), "sparsecnx: ", name, " must be contiguous");
  STD_TORCH_CHECK(x.numel() == numel, "sparsecnx: ", name, " has ", x.numel(), " elements, expected ", numel);
}

// (rows, channels) of a contiguous feature matrix whose start can be read 16 bytes at a time.
inline std::array<int64_t, 2> feature_shape(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "sparsecnx: ", name, " must be contiguous, (rows, channels)");
  STD_TORCH_CHECK(1 <= x.size(1) && x.size(1) <= kMostChannels, "sparsecnx: ", name, " has ", x.size(1),
                  " channels, expected 1 to ", kMostChannels);
  STD_TORCH_CHECK(x.size(0) < (int64_t{1} << 31), "sparsecnx: ", name, " has ", x.size(0),
                  " rows, expected fewer than 2^31");
  return {x.size(0), x.size(1)};
}

inline Tensor empty_on(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace sparsecnx::cuda
