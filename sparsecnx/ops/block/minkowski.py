"""The ConvNeXt V2 block with MinkowskiEngine's depthwise convolution.

It has no layer norm, GRN or stochastic depth: code written for it does these in torch, on the rows.
"""

from __future__ import annotations

import functools

from sparsecnx.ops.block import reference
from sparsecnx.ops.depthwise_convolution import minkowski

convnextv2_block = functools.partial(reference.convnextv2_block, depthwise_conv=minkowski.depthwise_conv)
