// Fills the table of kernels for an instruction set. The isa_*.cpp files include it last.
#pragma once

#include "kernels_conv.h"
#include "kernels_conv_narrow.h"
#include "kernels_depthwise.h"
#include "kernels_mapped.h"
#include "kernels_pooling.h"
#include "kernels_product.h"
#include "kernels_rows.h"
#include "kernels_site_norm.h"

namespace sparsecnx::SPARSECNX_ISA {

// The arguments are in the order of the members of `Kernels`.
template <class S>
Kernels<S> make_kernels() {
  using A = Compute<S>;
  return Kernels<S>(depthwise<S>, depthwise_weight_grad<S>, mapped_depthwise<S>, mapped_depthwise_weight_grad<S>,
                    max_pool<S>, max_pool_grad<S>, sum_pool<S>, moments<S>, normalise<S>, layer_norm_backward<S>,
                    column_moments<S>, site_norm<S>, site_norm_sums<S>, site_norm_grad<S>, energy<S>, affine<S>,
                    add_shift<S>, combine<S>, dot_and_sum<S>, column_sum<S>, scale_rows<S>, gelu_energy<S>,
                    gelu_grn_sums<S>, gelu_grn_backward<S>, kProductPanel * kLanes<S>, pack_panel<S>, product<A>,
                    gather_columns<A>, all_rows, kPanel * kLanes<S>, kLanes<S>, conv_pairs<A>,
                    conv_pairs_weight_grad<A>, conv_narrow<S>, conv_narrow_weight_grad<S>, is_narrow<S>,
                    columns_to_lanes<S>, lanes_to_columns<S>, convert<S>, convert<S>);
}

template Kernels<float> make_kernels<float>();
template Kernels<double> make_kernels<double>();
template Kernels<bfloat16> make_kernels<bfloat16>();
template Kernels<half> make_kernels<half>();

}  // namespace sparsecnx::SPARSECNX_ISA
