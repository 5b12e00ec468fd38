"""Operators on sparse tensors, one folder each: public function and dispatch, reference, fast backends."""

from sparsecnx.ops.conv import conv
from sparsecnx.ops.convnextv2_block import BlockParameters, convnextv2_block
from sparsecnx.ops.depthwise_conv import depthwise_conv
from sparsecnx.ops.grn import grn
from sparsecnx.ops.layer_norm import layer_norm
from sparsecnx.ops.mapped_conv import mapped_conv
from sparsecnx.ops.mapped_depthwise_conv import mapped_depthwise_conv
from sparsecnx.ops.mapped_pool import mapped_pool
from sparsecnx.ops.stochastic_depth import draw_survival, stochastic_depth

__all__ = [
    "BlockParameters",
    "conv",
    "convnextv2_block",
    "depthwise_conv",
    "draw_survival",
    "grn",
    "layer_norm",
    "mapped_conv",
    "mapped_depthwise_conv",
    "mapped_pool",
    "stochastic_depth",
]
