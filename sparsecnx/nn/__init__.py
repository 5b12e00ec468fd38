"""Modules whose meaning on a SparseTensor torch's own do not have, with torch's parameter names and shapes.

Layers of torch answer a SparseTensor too, see `sparsecnx.functions`.

Each also takes a dense tensor, as the torch module it derives from, so that one set of weights (one module)
serves both. State dicts are interchangeable.
"""

from sparsecnx.nn.block import ConvNeXtBlock, ConvNeXtV2Block
from sparsecnx.nn.layers import GELU, GRN, Conv2d, LayerNorm, LayerNorm2d, Linear, StochasticDepth

__all__ = [
    "GELU",
    "GRN",
    "Conv2d",
    "ConvNeXtBlock",
    "ConvNeXtV2Block",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "StochasticDepth",
]
