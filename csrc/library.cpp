// The schemas of all operators. Each file of csrc/cpu registers its implementations; fake kernels and autograd are
// registered in Python (sparsecnx/ops/*/cpu.py). Sizes that depend on a batch are SymInt, which kernels receive as
// int64_t: torch.compile would specialise an `int` to its first value and compile again for every other value.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY(sparsecnx, m) {
  m.def("cpu_isa() -> str");
  m.def("gather_tiles(Tensor dense, Tensor index, int[] tile) -> Tensor");
  m.def("scatter_tiles(Tensor rows, Tensor fill, Tensor index, SymInt batch, SymInt[] shape, int[] tile) -> Tensor");
  m.def("kernel_map(Tensor index, SymInt[] grid, int[] window) -> Tensor");
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor table, int[] tile) -> Tensor");
  m.def("depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor table, int[] tile, int[] kernel) -> Tensor");
  // A window on a grid of tiles stands for its kernel map: `kernel_map` is then the index of the visible tiles
  // (csrc/cpu/mapped.h).
  m.def("conv(Tensor x, Tensor weight, Tensor? bias, Tensor kernel_map, SymInt[] grid, int[] window) -> Tensor");
  m.def(
      "conv_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor kernel_map, SymInt[] grid, int[] window) -> "
      "Tensor");
  m.def(
      "mapped_depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor kernel_map, Tensor? inverse_map, "
      "SymInt[] grid, int[] window) -> Tensor");
  m.def(
      "mapped_depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor kernel_map, SymInt[] grid, int[] window) -> "
      "Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_weight_grad(Tensor grad, Tensor x) -> Tensor");
  m.def("max_pool(Tensor x, Tensor kernel_map, Tensor? inverse_map, SymInt[] grid, int[] window) -> (Tensor, Tensor)");
  m.def(
      "max_pool_backward(Tensor grad, Tensor winner, Tensor kernel_map, Tensor? inverse_map, SymInt[] grid, int[] "
      "window) -> "
      "Tensor");
  m.def(
      "sum_pool(Tensor x, Tensor kernel_map, Tensor? inverse_map, float factor, SymInt[] grid, int[] window) -> "
      "Tensor");
  m.def("grn(Tensor x, Tensor gamma, Tensor beta, Tensor splits, float eps) -> (Tensor, Tensor)");
  m.def(
      "grn_backward(Tensor grad, Tensor x, Tensor gamma, Tensor splits, Tensor energy, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor moments) -> (Tensor, Tensor, Tensor)");
  m.def(
      "site_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor splits, int groups, float eps, int activation, "
      "float slope) -> (Tensor, Tensor, Tensor)");
  m.def(
      "site_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
      "Tensor splits, int groups, float eps, int activation, float slope, bool needs_x) -> (Tensor, Tensor, Tensor)");
  m.def("scale_rows(Tensor x, Tensor scale, Tensor splits) -> Tensor");
  m.def(
      "convnextv2_block(Tensor x, Tensor dwconv_weight, Tensor dwconv_bias, Tensor norm_weight, Tensor norm_bias, "
      "Tensor pwconv1_weight, Tensor pwconv1_bias, Tensor grn_gamma, Tensor grn_beta, Tensor pwconv2_weight, "
      "Tensor pwconv2_bias, Tensor? row_scale, Tensor table, Tensor splits, int[] tile, float eps, "
      "float grn_eps, bool keep_hidden) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "convnextv2_block_backward(Tensor grad, Tensor x, Tensor dwconv_weight, Tensor dwconv_bias, "
      "Tensor norm_weight, Tensor norm_bias, Tensor pwconv1_weight, Tensor pwconv1_bias, Tensor grn_gamma, "
      "Tensor grn_beta, Tensor pwconv2_weight, Tensor pwconv2_bias, Tensor? row_scale, Tensor table, "
      "Tensor splits, int[] tile, float eps, float grn_eps, Tensor u, Tensor moments, Tensor energy, Tensor hidden) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// The operators of the GPU. csrc/cuda implements them in a library of its own.
STABLE_TORCH_LIBRARY(sparsecnx_cuda, m) {
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor table, int[] tile) -> Tensor");
  m.def(
      "depthwise_conv_fused(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor table, int[] tile, "
      "bool flip, float? eps) -> (Tensor, Tensor)");
  m.def(
      "depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor table, int[] tile, int[] kernel) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sparsecnx::cpu_isa));
}
