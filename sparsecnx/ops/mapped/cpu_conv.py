"""Convolution on an explicit kernel map by the compiled CPU kernel (`csrc/cpu/mapped.cpp`): gathered rows, GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops import flops


def convolve(
    features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (groups, K, C_in / groups, C_out / groups)`."""
    parts = [
        torch.ops.sparsecnx.conv(
            part.contiguous(), taps.permute(2, 0, 1).reshape(taps.shape[2], -1).contiguous(), kernel_map.contiguous()
        )
        for part, taps in zip(features.chunk(weight.shape[0], 1), weight, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out + bias.to(out.dtype)


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`.

    The inverse map is not used: the compiled gradient adds rows in the order of the map, in parallel over channels.
    """
    return convolve(x.features, weight[None], bias, x.kernel_map, None)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grad_x, grad_weight = torch.ops.sparsecnx.conv_backward(
        grad, saved.x, saved.weight, saved.kernel_map, "x" in saved.needs
    )
    return {"x": grad_x, "weight": grad_weight}


if compiled.loaded:
    register(
        "sparsecnx::conv",
        sizes={"x": "rows C", "kernel_map": "rows_out K", "weight": "C_out K*C"},
        fake=lambda x, weight, kernel_map: x.new_empty(kernel_map.shape[0], weight.shape[0]),
        saves=("x", "weight", "kernel_map"),
        backward=_backward,
        flops=flops.conv,
    )
    register(
        "sparsecnx::conv_backward",
        public="conv",
        flops=flops.conv_backward,
        fake=lambda grad, x, weight, kernel_map, needs_x: (
            x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]),
            torch.empty_like(weight),
        ),
    )
