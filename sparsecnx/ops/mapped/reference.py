"""Convolutions and the maximum on an explicit kernel map in plain torch, tap by tap."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.kernel_map import MappedRows, check_kernel_map


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    return _sum_over_taps(x, weight, bias, weight.shape[2], torch.matmul)


def mapped_depthwise_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    return _sum_over_taps(x, weight, bias, weight.shape[1], torch.mul)


def _sum_over_taps(
    x: MappedRows, weight: Tensor, bias: Tensor | None, channels: int, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    check_kernel_map(x.kernel_map, x.features.shape[0])
    wide = statistics_dtype(x.dtype)
    padded = F.pad(x.features.to(wide), (0, 0, 0, 1))  # A tap without an input reads this row of zeros.
    read = torch.where(x.kernel_map == -1, x.features.shape[0], x.kernel_map)
    out = padded.new_zeros(read.shape[0], channels)
    for tap, factor in zip(read.unbind(1), weight.to(wide), strict=True):
        out = out + product(padded.index_select(0, tap), factor)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def mapped_max_pool(x: MappedRows) -> Tensor:
    """Return the maximum of the rows under each output row, `(rows_out, C)`, 0 without any input."""
    rows_in, channels = x.features.shape
    check_kernel_map(x.kernel_map, rows_in)
    padded = F.pad(x.features, (0, 0, 0, 1))
    best = padded[:0].sum() + padded.new_zeros(x.kernel_map.shape[0], channels)  # with a gradient however few taps
    empty = torch.ones_like(x.kernel_map[:, :1], dtype=torch.bool)
    for rows in x.kernel_map.unbind(1):
        present = (rows >= 0)[:, None]
        value = padded.index_select(0, torch.where(rows == -1, rows_in, rows))
        # A NaN wins, as in torch's own pooling.
        best = torch.where(present & (empty | (value > best) | value.isnan()), value, best)
        empty = empty & ~present
    return best
