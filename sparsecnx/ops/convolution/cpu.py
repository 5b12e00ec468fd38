"""General submanifold convolution by the compiled CPU kernel (`csrc/cpu/mapped.cpp`): gathered rows, chunked GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.ops import flops
from sparsecnx.tensor import SparseTensor


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Return features `(rows / stride**ndim, C_out)` of the convolution with `weight (C_out, C_in, *kernel)`."""
    steps = (stride,) * x.layout.ndim
    kernel_map = x.layout.kernel_map(tuple(weight.shape[2:]), steps, padding, (1,) * x.layout.ndim)
    taps = weight.flatten(2).movedim(1, 2).reshape(weight.shape[0], -1)  # (C_out, K * C_in)
    out = torch.ops.sparsecnx.conv(x.features.contiguous(), taps.contiguous(), kernel_map)
    return out if bias is None else out + bias.to(out.dtype)


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
