"""Operators on sparse tensors. A folder holds one operator: public function, reference, and a file per backend.

No folder has the name of a function, so that `ops.grn` is the function.
"""

from sparsecnx.ops.block import BlockParameters, convnextv2_block
from sparsecnx.ops.convolution import conv, conv_transpose
from sparsecnx.ops.depthwise_convolution import depthwise_conv
from sparsecnx.ops.drop_path import draw_survival, stochastic_depth
from sparsecnx.ops.global_response_norm import grn
from sparsecnx.ops.layer_normalization import layer_norm
from sparsecnx.ops.mapped import mapped_conv, mapped_depthwise_conv, mapped_pool
from sparsecnx.ops.pooling import avg_pool, max_pool
from sparsecnx.ops.site_normalization import batch_norm, group_norm, instance_norm

__all__ = [
    "BlockParameters",
    "avg_pool",
    "batch_norm",
    "conv",
    "conv_transpose",
    "convnextv2_block",
    "depthwise_conv",
    "draw_survival",
    "grn",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "mapped_conv",
    "mapped_depthwise_conv",
    "mapped_pool",
    "max_pool",
    "stochastic_depth",
]
