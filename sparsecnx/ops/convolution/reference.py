"""Convolutions of the visible sites, dense: zero the masked sites, convolve, keep the sites of visible tiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.packing import gather_rows
from sparsecnx.ops.convolution.window import Window
from sparsecnx.ops.depthwise_convolution.reference import CONV
from sparsecnx.tensor import SparseTensor

CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_out, C_in / groups, *kernel)`."""
    coarse = x.layout.coarsen(window.stride)
    pads: list[int] = []  # The last axis comes first.
    for size, stride, before, extent in zip(coarse.shape, window.stride, window.padding, window.extent, strict=True):
        pads = [before, (size - 1) * stride + extent - size * stride - before, *pads]
    bias = None if bias is None else bias.to(x.dtype)
    return gather_rows(
        CONV[coarse.ndim](F.pad(x.dense(), pads), weight, bias, window.stride, 0, window.dilation, groups), coarse
    )


def conv_transpose(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`."""
    fine = x.layout.refine(window.stride)
    bias = None if bias is None else bias.to(x.dtype)
    out = CONV_TRANSPOSE[fine.ndim](x.dense(), weight, None, window.stride, 0, 0, groups, window.dilation)
    pads: list[int] = []  # Crop the padding, or add sites that no input reaches.
    for size, before, found in zip(fine.shape, window.padding, out.shape[2:], strict=True):
        pads = [-before, size + before - found, *pads]
    out = F.pad(out, pads)
    return gather_rows(out if bias is None else out + bias.view(-1, *[1] * fine.ndim), fine)
