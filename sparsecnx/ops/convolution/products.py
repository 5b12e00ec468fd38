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
    patches, children, channels = x.features, math.prod(window.stride), x.features.shape[1]
    if children > 1:
        patches = patches.reshape(x.layout.rows // children, children, channels)
        # A kernel of one tap reads the first child of each output site.
        patches = patches[:, 0] if max(window.kernel) == 1 else patches.flatten(1)
    bias = _cast(bias, patches)
    if groups == 1:
        return linear(patches, _matrix(weight), bias)
    rows, values = patches.shape
    by_group = patches.reshape(rows, values // channels, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)
    out = torch.bmm(by_group, _matrix(weight).view(groups, -1, by_group.shape[2]).mT).movedim(0, 1).flatten(1)
    return out if bias is None else out + bias


def conv_transpose(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`, kernel = stride."""
    children, width = math.prod(window.stride), weight.shape[1]
    bias = _cast(bias, x.features)
    if groups == 1:
        bias = None if bias is None else torch.cat((bias,) * children)  # repeat() takes 4 us more.
        return linear(x.features, _matrix(weight).t(), bias).view(-1, width)
    rows, channels = x.features.shape
    by_group = x.features.reshape(rows, groups, channels // groups).movedim(1, 0)
    out = torch.bmm(by_group, _matrix(weight).view(groups, -1, children * width)).view(groups, rows, children, width)
    out = out.permute(1, 2, 0, 3).reshape(rows * children, groups * width)
    return out if bias is None else out + bias


def _cast(bias: Tensor | None, features: Tensor) -> Tensor | None:
    return bias if bias is None or bias.dtype is features.dtype else bias.to(features.dtype)


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight `(n, m, *kernel)` as `(n, taps * m)`, taps in nested order."""
    longest = max(weight.shape[2:])
    if longest > 1:
        weight = weight.movedim(1, -1)
    if longest > 2:  # Up to 2 sites along each axis are in raster order.
        weight = tile_to_rows(weight).reshape(weight.shape[0], -1)
    return weight.flatten(1)
