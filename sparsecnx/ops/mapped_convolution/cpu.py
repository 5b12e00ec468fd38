"""Convolution on an explicit kernel map by the compiled CPU kernel (`csrc/cpu/conv.cpp`): gathered rows, chunked
GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops.convolution import native  # noqa: F401 - registers the gradient of the operator called here


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`.

    The inverse map is not used: the compiled gradient adds rows in the order of the map, in parallel over channels.
    """
    taps = weight.permute(2, 0, 1).reshape(weight.shape[2], -1)  # (C_out, K * C_in)
    out = torch.ops.sparsecnx.conv(x.features.contiguous(), taps.contiguous(), x.kernel_map.contiguous())
    return out if bias is None else out + bias.to(out.dtype)
