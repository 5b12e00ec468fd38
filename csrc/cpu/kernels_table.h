// Fills the table of kernels for an instruction set. The isa_*.cpp files include it last.
#pragma once

#include "kernels_depthwise.h"
#include "kernels_mapped.h"
#include "kernels_rows.h"

namespace sparsecnx::SPARSECNX_ISA {

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> k;
  k.depthwise = depthwise<S>;
  k.depthwise_weight_grad = depthwise_weight_grad<S>;
  k.mapped_depthwise = mapped_depthwise<S>;
  k.mapped_depthwise_weight_grad = mapped_depthwise_weight_grad<S>;
  k.moments = moments<S>;
  k.normalise = normalise<S>;
  k.layer_norm_backward = layer_norm_backward<S>;
  k.energy = energy<S>;
  k.affine = affine<S>;
  k.add_shift = add_shift<S>;
  k.combine = combine<S>;
  k.dot_and_sum = dot_and_sum<S>;
  k.column_sum = column_sum<S>;
  k.scale_rows = scale_rows<S>;
  k.gelu_energy = gelu_energy<S>;
  k.gelu_grn_sums = gelu_grn_sums<S>;
  k.gelu_grn_backward = gelu_grn_backward<S>;
  k.gather = gather<S>;
  k.scatter_add = scatter_add<S>;
  k.widen = widen<S>;
  k.narrow = narrow<S>;
  return k;
}

template Kernels<float> make_kernels<float>();
template Kernels<double> make_kernels<double>();
template Kernels<bfloat16> make_kernels<bfloat16>();
template Kernels<half> make_kernels<half>();

}  // namespace sparsecnx::SPARSECNX_ISA
