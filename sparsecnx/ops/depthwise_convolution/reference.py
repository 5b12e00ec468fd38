"""Submanifold depthwise convolution, dense: zero the masked sites, convolve, keep the active sites."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.packing import gather_rows
from sparsecnx.tensor import SparseTensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows, C)` of the convolution of `x` with `weight (C, 1, *kernel)`."""
    padding = [size // 2 for size in weight.shape[2:]]
    bias = None if bias is None else bias.flatten().to(x.dtype)
    out = CONV[x.layout.ndim](x.dense(), weight, bias, padding=padding, groups=weight.shape[0])
    return gather_rows(out, x.layout)
