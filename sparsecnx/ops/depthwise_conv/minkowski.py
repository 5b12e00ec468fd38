"""Submanifold depthwise convolution by MinkowskiEngine: its channelwise module, or the CUDA kernel of a fork.

The fork (github.com/shwoo93/MinkowskiEngine) calls it `MinkowskiDepthwiseConvolution` and has it for GPUs only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsecnx import _minkowski
from sparsecnx.ops.minkowski import maps, not_traced, taps
from sparsecnx.tensor import SparseTensor


@not_traced
def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows, C)` of the convolution of `x` with `weight (C, 1, *kernel)`."""
    layout = x.layout
    kernel = taps(weight)[:, 0]  # (K, C)
    if layout.rows == 0:  # the library reads memory that is none of its own
        out = x.features * kernel.sum(0)
    else:
        library = _minkowski.library()
        module = _module(library, x.device.type, x.features.shape[1], tuple(weight.shape[2:]))
        with torch.cuda.device_of(x.features):
            geometry = maps(layout.tiles)
            rows = library.SparseTensor(
                x.features, coordinate_map_key=geometry.key(layout), coordinate_manager=geometry.manager
            )
            out = torch.func.functional_call(module, {"kernel": kernel}, (rows,)).F
    return out if bias is None else out + bias.to(out.dtype)


@functools.lru_cache(maxsize=256)
def _module(library: Any, device: str, channels: int, kernel: tuple[int, ...]) -> torch.nn.Module:
    """The library's module; its own parameters are never used."""
    kind = library.MinkowskiChannelwiseConvolution
    if device == "cuda":
        kind = getattr(library, "MinkowskiDepthwiseConvolution", kind)
    with torch.random.fork_rng(devices=[]):  # they are drawn all the same
        return kind(channels, kernel, dimension=len(kernel))
