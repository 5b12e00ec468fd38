"""Submanifold depthwise convolution by MinkowskiEngine: its channelwise module, or the CUDA kernel of a fork.

The fork (github.com/shwoo93/MinkowskiEngine) calls it `MinkowskiDepthwiseConvolution` and has it for GPUs only, without
gradients of gradients. The channelwise module is made of torch's operators and has them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import minkowski
from sparsecnx.backends.minkowski import differentiable_once, not_traced, taps
from sparsecnx.geometry.minkowski_maps import maps
from sparsecnx.tensor import SparseTensor

FORK = "MinkowskiDepthwiseConvolution"


@not_traced
def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows, C)` of the convolution of `x` with `weight (C, 1, *kernel)`."""
    layout, features = x.layout, x.features
    kernel = taps(weight)[:, 0]  # (K, C)
    if layout.rows == 0:  # The library would read memory that is not its own.
        out = features * kernel.sum(0)
    else:
        library = minkowski.library()
        forked = x.device.type == "cuda" and hasattr(library, FORK)
        layer = _layer(getattr(library, FORK) if forked else library.MinkowskiChannelwiseConvolution)
        if forked:
            features, kernel = differentiable_once(features, kernel)
        # Each call has its own module: while it runs, the kernel is its parameter.
        module = layer(features.shape[1], tuple(weight.shape[2:]), dimension=layout.ndim)
        with torch.cuda.device_of(features):
            geometry = maps(layout.tiles)
            rows = library.SparseTensor(
                features, coordinate_map_key=geometry.key(layout), coordinate_manager=geometry.manager
            )
            out = torch.func.functional_call(module, {"kernel": kernel}, (rows,)).F
    return out if bias is None else out + bias.to(out.dtype)


@functools.cache
def _layer(kind: Any) -> Any:
    """Return the library's class for modules whose own parameters are never used.

    None are drawn, so that the random numbers of the process stay as they were.
    """
    return type(kind.__name__, (kind,), {"reset_parameters": lambda *_: None})
