"""Depthwise convolution on an explicit kernel map in plain torch, tap by tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops.checks import statistics_dtype


def mapped_depthwise_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    wide = statistics_dtype(x.dtype)
    rows, channels = x.features.shape
    padded = F.pad(x.features.to(wide), (0, 0, 0, 1))  # the row of zeros that a tap without an input reads
    read = torch.where(x.kernel_map == -1, rows, x.kernel_map)
    out = padded.new_zeros(read.shape[0], channels)
    for tap, factor in zip(read.unbind(1), weight.to(wide), strict=True):
        out = out + factor * padded.index_select(0, tap)
    return (out if bias is None else out + bias).to(x.dtype)
