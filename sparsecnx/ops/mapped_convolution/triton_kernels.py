"""Convolution on an explicit kernel map on a GPU: rows gathered by a Triton kernel, products by the library, as in
`sparsecnx.ops.convolution.triton_kernels`."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops.convolution.triton_kernels import rows_conv


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    taps = weight.permute(2, 0, 1).reshape(weight.shape[2], -1)  # (C_out, K * C_in)
    maps = (x.kernel_map.contiguous(), None if x.inverse_map is None else x.inverse_map.contiguous())
    out = rows_conv(x.features.contiguous(), taps.contiguous(), *maps)
    return out if bias is None else out + bias.to(out.dtype)
