// sparsecnx_cuda::depthwise_conv, with what may be fused into it, and its weight gradient.
#include "depthwise_conv.h"

#include "op.h"
#include "ops.h"

namespace sparsecnx::cuda {
namespace {

// Checks what describes the sites, and gathers it.
DepthwiseGeometry check_geometry(const Tensor& x, const Tensor& table, int64_t tile, int64_t kernel_h,
                                 int64_t kernel_w) {
  const auto [rows, channels] = feature_shape(x, "x");
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
          static_cast<int>(channels), dtype_of(x, "x")};
}

}  // namespace

std::tuple<Tensor, Tensor> depthwise_conv_fused(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const Tensor& table,
                                                int64_t tile, bool flip, std::optional<double> eps) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1, "sparsecnx: weight must be (C, 1, kh, kw)");
  const DepthwiseGeometry geometry = check_geometry(x, table, tile, weight.size(2), weight.size(3));
  const int64_t rows = x.size(0), channels = x.size(1);
  check_dense(weight, "weight", channels * weight.size(2) * weight.size(3), x.scalar_type(), x);
  if (bias) check_dense(*bias, "bias", channels, ScalarType::Float, x);
  if (residual) check_dense(*residual, "residual", rows * channels, x.scalar_type(), x);
  const OnDevice guard(x);
  Tensor out = empty_on(x, {rows, channels}, x.scalar_type());
  Tensor rstd = empty_on(x, {eps ? rows : 0}, ScalarType::Float);
  depthwise_conv(
      {geometry, data(x), data(weight), static_cast<const float*>(data_or_null(bias)), data_or_null(residual),
       data(out), eps ? data<float>(rstd) : nullptr, static_cast<float>(eps.value_or(0.0)), flip},
      current_stream(x));
  return {out, rstd};
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      int64_t tile) {
  return std::get<0>(depthwise_conv_fused(x, weight, bias, std::nullopt, table, tile, false, std::nullopt));
}

std::tuple<Tensor, Tensor> depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table,
                                                      int64_t tile, int64_t kernel_h, int64_t kernel_w) {
  const DepthwiseGeometry geometry = check_geometry(x, table, tile, kernel_h, kernel_w);
  const int64_t channels = x.size(1);
  check_dense(grad, "grad", x.numel(), x.scalar_type(), x);
  const OnDevice guard(x);
  const int64_t ranges = depthwise_ranges(geometry);
  Tensor partial = empty_on(x, {ranges, kernel_h * kernel_w + 1, channels}, ScalarType::Float);
  Tensor grad_weight = empty_on(x, {channels, 1, kernel_h, kernel_w}, x.scalar_type());
  Tensor grad_bias = empty_on(x, {channels}, ScalarType::Float);
  depthwise_conv_weight_grad(
      {geometry, data(grad), data(x), data<float>(partial), ranges, data(grad_weight), data<float>(grad_bias)},
      current_stream(x));
  return {grad_weight, grad_bias};
}

}  // namespace sparsecnx::cuda
