// Registers the implementations for one kind of device; the schemas are in csrc/library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace sparsecnx::cuda {

template <class Library>
void implement(Library& m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_fused", TORCH_BOX(&depthwise_conv_fused));
  m.impl("depthwise_conv_weight_grad", TORCH_BOX(&depthwise_conv_weight_grad));
  m.impl("grn", TORCH_BOX(&grn));
  m.impl("grn_backward", TORCH_BOX(&grn_backward));
  m.impl("gather_tiles", TORCH_BOX(&gather_tiles));
  m.impl("scatter_tiles", TORCH_BOX(&scatter_tiles));
  m.impl("tile_index", TORCH_BOX(&tile_index));
  m.impl("neighbour_table", TORCH_BOX(&neighbour_table));
}

}  // namespace sparsecnx::cuda
