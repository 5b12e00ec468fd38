"""Convolutions that are one matrix product on packed rows: 1x1 of any stride, and kernel = stride (patchify).

Where the children of a site are consecutive rows, the product of a patchify convolution needs no gather.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.nested_order import children_are_consecutive, tile_to_rows
from sparsecnx.ops.convolution.window import Window
from sparsecnx.ops.linear import linear
from sparsecnx.tensor import SparseTensor


def applies(layout: Layout, window: Window) -> bool:
    """Return whether a convolution from `layout` to `layout.coarsen(stride)` is a product of consecutive rows."""
    whole = window.partitions or (max(window.kernel) == 1 and not any(window.padding))
    return whole and children_are_consecutive(layout.tile, window.stride)


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_out, C_in / groups, *kernel)`."""
    children, channels = math.prod(window.stride), x.features.shape[1]
    patches = x.features.reshape(x.layout.rows // children, children, channels)
    if max(window.kernel) == 1:
        patches = patches[:, :1]  # A kernel of one tap reads the first child of each output site.
    nested = _nested(weight.movedim(1, -1))  # (C_out, children, C_in / groups)
    bias = None if bias is None else bias.to(x.dtype)
    if groups == 1:
        return linear(patches.flatten(1), nested.flatten(1), bias)
    rows, children, _ = patches.shape
    by_group = patches.reshape(rows, children, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)
    out = torch.bmm(by_group, nested.view(groups, -1, by_group.shape[2]).mT).movedim(0, 1).flatten(1)
    return out if bias is None else out + bias


def conv_transpose(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`, kernel = stride."""
    nested = _nested(weight.movedim(1, -1))  # (C_in, children, C_out / groups)
    children, width = nested.shape[1:]
    bias = None if bias is None else bias.to(x.dtype)
    if groups == 1:
        bias = None if bias is None else bias.repeat(children)
        return linear(x.features, nested.flatten(1).t(), bias).view(-1, width)
    rows, channels = x.features.shape
    by_group = x.features.reshape(rows, groups, channels // groups).movedim(1, 0)
    out = torch.bmm(by_group, nested.view(groups, -1, children * width)).view(groups, rows, children, width)
    out = out.permute(1, 2, 0, 3).reshape(rows * children, groups * width)
    return out if bias is None else out + bias


def _nested(weight: Tensor) -> Tensor:
    """Return a weight `(n, *kernel, m)` as `(n, taps, m)`, taps in nested order."""
    taps = math.prod(weight.shape[1:-1])
    return tile_to_rows(weight).view(weight.shape[0], taps, weight.shape[-1])
