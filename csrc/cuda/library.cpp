// The shared library sparsecnx._C_cuda. Loading it gives the operators sparsecnx_cuda::* their GPU implementations;
// their schemas are in csrc/library.cpp. Only PyTorch's ABI-stable headers are used.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../storage.h"
#include "depthwise.h"
#include "stream.h"

#ifndef SPARSECNX_DISPATCH_KEY  // The emulator of the tests registers the operators for tensors on the CPU.
#define SPARSECNX_DISPATCH_KEY CUDA
#endif

namespace sparsecnx::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;

using Sizes = std::vector<int64_t>;  // one for each axis

constexpr int64_t kMostChannels = 1 << 16;
constexpr int64_t kMostRows = int64_t{1} << 31;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "sparsecnx: x is ", torch::headeronly::toString(x.scalar_type()),
                      ", expected float32, bfloat16 or float16");
  }
}

template <class T = void>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T = void>
T* data_or_null(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

// Raises unless x is contiguous and has that many elements, that dtype and the device of `like`.
void check_dense(const Tensor& x, const char* name, int64_t numel, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), "sparsecnx: ", name, " is on device ", x.get_device_index(),
                  ", the first argument on device ", like.get_device_index());
  STD_TORCH_CHECK(x.scalar_type() == dtype, "sparsecnx: ", name, " is ", torch::headeronly::toString(x.scalar_type()),
                  ", expected ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(x.is_contiguous(), "sparsecnx: ", name, " must be contiguous");
  STD_TORCH_CHECK(x.numel() == numel, "sparsecnx: ", name, " has ", x.numel(), " elements, expected ", numel);
  check_storage(x, name);
}

// Returns sizes along three axes: 1 along the first ones of fewer.
Sizes3 three(const Sizes& sizes) {
  Sizes3 found{1, 1, 1};
  std::copy(sizes.begin(), sizes.end(), found.end() - sizes.size());
  return found;
}

// Returns sizes as in 7x7.
std::string spelled(const Sizes& sizes) {
  std::string found;
  for (const int64_t size : sizes) found += (found.empty() ? "" : "x") + std::to_string(size);
  return found;
}

// Checks the arguments that describe the sites and returns them together.
DepthwiseGeometry check_geometry(const Tensor& x, const Tensor& table, const Sizes& tile, const Sizes& kernel) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "sparsecnx: x must be contiguous, (rows, channels)");
  check_storage(x, "x");
  const int64_t rows = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(1 <= channels && channels <= kMostChannels, "sparsecnx: x has ", channels,
                  " channels, expected 1 to ", kMostChannels);
  STD_TORCH_CHECK(rows < kMostRows, "sparsecnx: x has ", rows, " rows, expected fewer than 2^31");
  STD_TORCH_CHECK(1 <= tile.size() && tile.size() <= 3 && kernel.size() == tile.size(), "sparsecnx: tile is ",
                  spelled(tile), " and the kernel ", spelled(kernel), ", expected one to three axes, as many of both");
  Sizes span;
  int64_t sites = 1, neighbours = 1;
  for (size_t axis = 0; axis < tile.size(); ++axis) {
    const int64_t side = tile[axis], size = kernel[axis];
    STD_TORCH_CHECK(side >= 1 && side <= (1 << 15), "sparsecnx: tile is ", spelled(tile),
                    ", expected 1 to 32768 sites along each axis");
    STD_TORCH_CHECK(0 < size && size < 1024 && size % 2 == 1, "sparsecnx: the kernel is ", spelled(kernel),
                    ", expected odd sizes below 1024");
    span.push_back(2 * blocks_of(size / 2, side) + 1);
    sites *= side;
    neighbours *= span.back();
  }
  STD_TORCH_CHECK(sites < kMostRows, "sparsecnx: a tile has ", sites, " sites, expected fewer than 2^31");
  STD_TORCH_CHECK(rows % sites == 0, "sparsecnx: x has ", rows, " rows, expected a multiple of the ", sites,
                  " sites of a tile");
  check_dense(table, "table", rows / sites * neighbours, ScalarType::Int, x);
  return {data<int32_t>(table),       rows / sites, three(tile), three(span), three(kernel),
          static_cast<int>(channels), dtype_of(x)};
}

// Returns the size of the kernel of a weight (C, 1, *kernel).
Sizes kernel_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() > 2 && weight.size(1) == 1, "sparsecnx: weight must be (C, 1, *kernel)");
  return {weight.sizes().begin() + 2, weight.sizes().end()};
}

std::tuple<Tensor, Tensor> depthwise_conv_fused(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const Tensor& table, Sizes tile,
                                                bool flip, std::optional<double> eps) {
  const DepthwiseGeometry geometry = check_geometry(x, table, tile, kernel_of(weight));
  const int64_t rows = x.size(0), channels = x.size(1);
  check_dense(weight, "weight", channels * volume(geometry.kernel), x.scalar_type(), x);
  if (bias) check_dense(*bias, "bias", channels, ScalarType::Float, x);
  if (residual) check_dense(*residual, "residual", rows * channels, x.scalar_type(), x);
  const OnDevice guard(x);
  Tensor out = new_empty(x, {rows, channels}, x.scalar_type());
  Tensor rstd = new_empty(x, {eps ? rows : 0}, ScalarType::Float);
  run_depthwise_conv({geometry, data(x), data(weight), data_or_null<float>(bias), data_or_null(residual), data(out),
                      eps ? data<float>(rstd) : nullptr, static_cast<float>(eps.value_or(0.0)), flip},
                     current_stream(x));
  return {out, rstd};
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      Sizes tile) {
  return std::get<0>(depthwise_conv_fused(x, weight, bias, std::nullopt, table, tile, false, std::nullopt));
}

std::tuple<Tensor, Tensor> depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table,
                                                      Sizes tile, Sizes kernel) {
  const DepthwiseGeometry geometry = check_geometry(x, table, tile, kernel);
  const int64_t channels = x.size(1);
  check_dense(grad, "grad", x.numel(), x.scalar_type(), x);
  const OnDevice guard(x);
  const int64_t ranges = depthwise_ranges(geometry);
  Tensor partial = new_empty(x, {ranges, volume(geometry.kernel) + 1, channels}, ScalarType::Float);
  Sizes shape{channels, 1};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor grad_weight = new_empty(x, shape, x.scalar_type());
  Tensor grad_bias = new_empty(x, {channels}, ScalarType::Float);
  run_depthwise_weight_grad(
      {geometry, data(grad), data(x), data<float>(partial), ranges, data(grad_weight), data<float>(grad_bias)},
      current_stream(x));
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsecnx_cuda, SPARSECNX_DISPATCH_KEY, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_fused", TORCH_BOX(&depthwise_conv_fused));
  m.impl("depthwise_conv_weight_grad", TORCH_BOX(&depthwise_conv_weight_grad));
}

}  // namespace sparsecnx::cuda
