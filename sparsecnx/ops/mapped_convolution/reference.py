"""Convolution on an explicit kernel map in plain torch, tap by tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops.checks import statistics_dtype


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    wide = statistics_dtype(x.dtype)
    padded = F.pad(x.features.to(wide), (0, 0, 0, 1))  # the row of zeros that a tap without an input reads
    read = torch.where(x.kernel_map == -1, x.features.shape[0], x.kernel_map)
    out = padded.new_zeros(read.shape[0], weight.shape[2])
    for tap, matrix in zip(read.unbind(1), weight.to(wide), strict=True):
        out = out + padded.index_select(0, tap) @ matrix
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
