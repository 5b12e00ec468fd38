// The shared library sparsecnx._C_cuda. Loading it gives the operators sparsecnx_cuda::* their GPU implementations;
// their schemas are in csrc/library.cpp. Only PyTorch's ABI-stable headers are used.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
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

// Checks the arguments that describe the sites and returns them together.
DepthwiseGeometry check_geometry(const Tensor& x, const Tensor& table, const Sizes& sides, const Sizes& kernel) {
  STD_TORCH_CHECK(sides.size() == 2 && kernel.size() == 2 && sides[0] == sides[1],
                  "sparsecnx: the CUDA kernels take square tiles of two dimensions");
  const int64_t tile = sides[0], kernel_h = kernel[0], kernel_w = kernel[1];
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "sparsecnx: x must be contiguous, (rows, channels)");
  check_storage(x, "x");
  const int64_t rows = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(1 <= channels && channels <= kMostChannels, "sparsecnx: x has ", channels,
                  " channels, expected 1 to ", kMostChannels);
  STD_TORCH_CHECK(rows < (int64_t{1} << 31), "sparsecnx: x has ", rows, " rows, expected fewer than 2^31");
  STD_TORCH_CHECK(tile >= 1 && tile <= (1 << 15), "sparsecnx: tile is ", tile, ", expected 1 to 32768 sites");
  STD_TORCH_CHECK(kernel_h > 0 && kernel_w > 0 && kernel_h % 2 == 1 && kernel_w % 2 == 1, "sparsecnx: the kernel is ",
                  kernel_h, "x", kernel_w, ", expected odd sizes");
  STD_TORCH_CHECK(kernel_h < 1024 && kernel_w < 1024, "sparsecnx: the kernel is ", kernel_h, "x", kernel_w,
                  ", expected sizes below 1024");
  const int64_t sites = tile * tile, tiles = rows / sites;
  STD_TORCH_CHECK(rows % sites == 0, "sparsecnx: x has ", rows, " rows, expected a multiple of tile^2 = ", sites);
  const int64_t reach = blocks_of(std::max(kernel_h, kernel_w) / 2, tile), span = 2 * reach + 1;
  check_dense(table, "table", tiles * span * span, ScalarType::Int, x);
  return {data<int32_t>(table),       tiles,
          static_cast<int>(tile),     static_cast<int>(span),
          static_cast<int>(kernel_h), static_cast<int>(kernel_w),
          static_cast<int>(channels), dtype_of(x)};
}

std::tuple<Tensor, Tensor> depthwise_conv_fused(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const Tensor& table, Sizes tile,
                                                bool flip, std::optional<double> eps) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1, "sparsecnx: weight must be (C, 1, kh, kw)");
  const DepthwiseGeometry geometry = check_geometry(x, table, tile, {weight.size(2), weight.size(3)});
  const int64_t rows = x.size(0), channels = x.size(1);
  check_dense(weight, "weight", channels * weight.size(2) * weight.size(3), x.scalar_type(), x);
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
  Tensor partial = new_empty(x, {ranges, kernel[0] * kernel[1] + 1, channels}, ScalarType::Float);
  Tensor grad_weight = new_empty(x, {channels, 1, kernel[0], kernel[1]}, x.scalar_type());
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
