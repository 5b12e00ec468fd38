"""Convolutions that are one matrix product on packed rows: 1x1, and kernel = stride (patchify).

Nested row order puts the sites under a patchify kernel in consecutive rows, so the product needs no gather.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.layout import per_axis
from sparsecnx.geometry.nested_order import children_are_consecutive, tile_to_rows
from sparsecnx.tensor import SparseTensor


def applies(x: SparseTensor, kernel: tuple[int, ...], stride: int, padding: tuple[int, ...]) -> bool:
    """Return whether a convolution reads exactly the `stride**ndim` consecutive rows of each output site."""
    steps = per_axis(stride, len(kernel))
    return kernel == steps and not any(padding) and children_are_consecutive(x.layout.tile, steps)


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Return features `(rows / stride**ndim, C_out)`; `weight (C_out, C_in, *([stride] * ndim))`, no padding."""
    if stride == 1:
        nested = weight.flatten(1)
    elif stride == 2:  # Raster order is nested order.
        nested = weight.movedim(1, -1).flatten(1)
    else:
        nested = tile_to_rows(weight.movedim(1, -1)).reshape(weight.shape[0], -1)
    patches = x.features if stride == 1 else x.features.reshape(-1, nested.shape[1])
    return F.linear(patches, nested, None if bias is None else bias.to(x.dtype))
