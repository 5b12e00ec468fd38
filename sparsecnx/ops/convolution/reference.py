"""Submanifold convolution, dense: zero the masked sites, convolve, keep the sites of visible tiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.layout import per_axis
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.ops.depthwise_convolution.reference import CONV
from sparsecnx.tensor import SparseTensor


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Return features `(rows / stride**ndim, C_out)` of the convolution with `weight (C_out, C_in, *kernel)`."""
    coarse = x.layout.coarsen(stride)
    before_and_after = []
    steps = per_axis(stride, coarse.ndim)
    for size, step, kernel, before in zip(
        coarse.shape[::-1], steps[::-1], weight.shape[:1:-1], padding[::-1], strict=True
    ):
        extent = (size - 1) * step + kernel  # Input sites that an output of that size needs.
        before_and_after += [before, extent - size * step - before]
    padded = F.pad(x.dense(), before_and_after)
    bias = None if bias is None else bias.to(x.dtype)
    out = CONV[x.layout.ndim](padded, weight, bias, stride=stride)
    return gather_rows(out, coarse)
