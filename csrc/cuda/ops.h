// The GPU operators, as implement.h registers them. Shapes: rows of features (rows, C) in nested order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sparsecnx::cuda {

using torch::stable::Tensor;

// depthwise_conv.cpp
Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      int64_t tile);
std::tuple<Tensor, Tensor> depthwise_conv_fused(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const Tensor& table,
                                                int64_t tile, bool flip, std::optional<double> eps);
std::tuple<Tensor, Tensor> depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table,
                                                      int64_t tile, int64_t kernel_h, int64_t kernel_w);

// grn.cpp
std::tuple<Tensor, Tensor> grn(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& segments,
                               double eps);
std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& segments, const Tensor& energy, double eps);

// packing.cpp
Tensor gather_tiles(const Tensor& dense, const Tensor& index, const Tensor& slots, int64_t tile);
Tensor scatter_tiles(const Tensor& rows, const Tensor& fill, const Tensor& index, const Tensor& slots, int64_t batch,
                     int64_t height, int64_t width, int64_t tile);

// layout.cpp
std::tuple<Tensor, Tensor, Tensor> tile_index(const Tensor& mask, int64_t count, int64_t visible);
Tensor neighbour_table(const Tensor& index, const Tensor& slots, std::vector<int64_t> grid, int64_t radius);

}  // namespace sparsecnx::cuda
