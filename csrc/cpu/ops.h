// The CPU operators, as csrc/library.cpp registers them. Shapes: rows of features (rows, C) in nested order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace sparsecnx {

using torch::stable::Tensor;

Tensor gather_tiles(const Tensor& dense, const Tensor& index, int64_t tile);
Tensor scatter_tiles(const Tensor& rows, const Tensor& fill, const Tensor& index, int64_t batch, int64_t height,
                     int64_t width, int64_t tile);

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      int64_t tile);
Tensor depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table, int64_t tile,
                                  int64_t kernel_h, int64_t kernel_w);

Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& kernel_map);
std::tuple<Tensor, Tensor> conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const Tensor& kernel_map, bool needs_x);

Tensor mapped_depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& kernel_map, const std::optional<Tensor>& inverse_map);
Tensor mapped_depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& kernel_map);

std::tuple<Tensor, Tensor> grn(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& segments,
                               double eps);
std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& segments, const Tensor& energy, double eps);

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& moments);

Tensor scale_rows(const Tensor& x, const Tensor& scale, const Tensor& splits);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> convnextv2_block(
    const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& pwconv1_weight, const Tensor& pwconv1_bias, const Tensor& grn_gamma,
    const Tensor& grn_beta, const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
    const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& segments, int64_t tile, double eps,
    bool keep_hidden);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
convnextv2_block_backward(const Tensor& grad, const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias,
                          const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& pwconv1_weight,
                          const Tensor& pwconv1_bias, const Tensor& grn_gamma, const Tensor& grn_beta,
                          const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
                          const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& segments,
                          int64_t tile, double eps, const Tensor& u, const Tensor& moments, const Tensor& energy,
                          const Tensor& hidden);

}  // namespace sparsecnx
