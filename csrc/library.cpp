// The operators' schemas and their implementations per device. Fake kernels and autograd are registered in Python,
// in sparsecnx/ops/*/native.py. Sizes that follow a batch are SymInt, which kernels receive as int64_t: torch.compile
// would fix an `int` to its first value, and compile anew for every other.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace {

std::string cpu_isa() { return sparsecnx::cpu_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(sparsecnx, m) {
  m.def("cpu_isa() -> str");
  m.def("gather_tiles(Tensor dense, Tensor index, int tile) -> Tensor");
  m.def(
      "scatter_tiles(Tensor rows, Tensor fill, Tensor index, SymInt batch, SymInt height, SymInt width, int tile) -> "
      "Tensor");
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor table, int tile) -> Tensor");
  m.def(
      "depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor table, int tile, int kernel_h, int kernel_w) -> "
      "Tensor");
  m.def("conv(Tensor x, Tensor weight, Tensor kernel_map) -> Tensor");
  m.def("conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor kernel_map, bool needs_x) -> (Tensor, Tensor)");
  m.def(
      "mapped_depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor kernel_map, Tensor? inverse_map) -> "
      "Tensor");
  m.def("mapped_depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor kernel_map) -> Tensor");
  m.def("grn(Tensor x, Tensor gamma, Tensor beta, Tensor segments, float eps) -> (Tensor, Tensor)");
  m.def(
      "grn_backward(Tensor grad, Tensor x, Tensor gamma, Tensor segments, Tensor energy, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor moments) -> (Tensor, Tensor, Tensor)");
  m.def("scale_rows(Tensor x, Tensor scale, Tensor splits) -> Tensor");
  m.def(
      "convnextv2_block(Tensor x, Tensor dwconv_weight, Tensor dwconv_bias, Tensor norm_weight, Tensor norm_bias, "
      "Tensor pwconv1_weight, Tensor pwconv1_bias, Tensor grn_gamma, Tensor grn_beta, Tensor pwconv2_weight, "
      "Tensor pwconv2_bias, Tensor? row_scale, Tensor table, Tensor segments, int tile, float eps, "
      "bool keep_hidden) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "convnextv2_block_backward(Tensor grad, Tensor x, Tensor dwconv_weight, Tensor dwconv_bias, "
      "Tensor norm_weight, Tensor norm_bias, Tensor pwconv1_weight, Tensor pwconv1_bias, Tensor grn_gamma, "
      "Tensor grn_beta, Tensor pwconv2_weight, Tensor pwconv2_bias, Tensor? row_scale, Tensor table, "
      "Tensor segments, int tile, float eps, Tensor u, Tensor moments, Tensor energy, Tensor hidden) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// Of the GPU, where shapes and arguments are not quite those of the CPU; implemented by csrc/cuda.
STABLE_TORCH_LIBRARY(sparsecnx_cuda, m) {
  m.def("gather_tiles(Tensor dense, Tensor index, Tensor slots, int tile) -> Tensor");
  m.def(
      "scatter_tiles(Tensor rows, Tensor fill, Tensor index, Tensor slots, SymInt batch, SymInt height, SymInt width, "
      "int tile) -> Tensor");
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor table, int tile) -> Tensor");
  m.def(
      "depthwise_conv_fused(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor table, int tile, "
      "bool flip, float? eps) -> (Tensor, Tensor)");
  m.def(
      "depthwise_conv_weight_grad(Tensor grad, Tensor x, Tensor table, int tile, int kernel_h, int kernel_w) -> "
      "(Tensor, Tensor)");
  m.def("grn(Tensor x, Tensor gamma, Tensor beta, Tensor segments, float eps) -> (Tensor, Tensor)");
  m.def(
      "grn_backward(Tensor grad, Tensor x, Tensor gamma, Tensor segments, Tensor energy, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("tile_index(Tensor mask, SymInt count, SymInt visible) -> (Tensor, Tensor, Tensor)");
  m.def("neighbour_table(Tensor index, Tensor slots, SymInt[] grid, int radius) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("gather_tiles", TORCH_BOX(&sparsecnx::gather_tiles));
  m.impl("scatter_tiles", TORCH_BOX(&sparsecnx::scatter_tiles));
  m.impl("depthwise_conv", TORCH_BOX(&sparsecnx::depthwise_conv));
  m.impl("depthwise_conv_weight_grad", TORCH_BOX(&sparsecnx::depthwise_conv_weight_grad));
  m.impl("conv", TORCH_BOX(&sparsecnx::conv));
  m.impl("conv_backward", TORCH_BOX(&sparsecnx::conv_backward));
  m.impl("mapped_depthwise_conv", TORCH_BOX(&sparsecnx::mapped_depthwise_conv));
  m.impl("mapped_depthwise_conv_weight_grad", TORCH_BOX(&sparsecnx::mapped_depthwise_conv_weight_grad));
  m.impl("grn", TORCH_BOX(&sparsecnx::grn));
  m.impl("grn_backward", TORCH_BOX(&sparsecnx::grn_backward));
  m.impl("layer_norm", TORCH_BOX(&sparsecnx::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&sparsecnx::layer_norm_backward));
  m.impl("scale_rows", TORCH_BOX(&sparsecnx::scale_rows));
  m.impl("convnextv2_block", TORCH_BOX(&sparsecnx::convnextv2_block));
  m.impl("convnextv2_block_backward", TORCH_BOX(&sparsecnx::convnextv2_block_backward));
}
