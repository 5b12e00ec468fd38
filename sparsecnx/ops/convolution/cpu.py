"""General submanifold convolution by the compiled CPU kernel (`csrc/cpu/conv.cpp`): gathered rows, chunked GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.tensor import SparseTensor


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Features `(rows / stride**ndim, C_out)` of the convolution with `weight (C_out, C_in, *kernel)`."""
    kernel_map = x.layout.kernel_map(tuple(weight.shape[2:]), stride, padding)
    taps = weight.flatten(2).movedim(1, 2).reshape(weight.shape[0], -1)  # (C_out, K * C_in)
    out = torch.ops.sparsecnx.conv(x.features.contiguous(), taps.contiguous(), kernel_map)
    return out if bias is None else out + bias.to(out.dtype)


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::conv")
    def _(x: Tensor, weight: Tensor, kernel_map: Tensor) -> Tensor:
        return x.new_empty(kernel_map.shape[0], weight.shape[0])

    @torch.library.register_fake("sparsecnx::conv_backward")
    def _(grad: Tensor, x: Tensor, weight: Tensor, kernel_map: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]), torch.empty_like(weight)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kernel_map = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weight = torch.ops.sparsecnx.conv_backward(grad.contiguous(), x, weight, kernel_map, needs_x)
        return grad_x if needs_x else None, grad_weight, None

    torch.library.register_autograd("sparsecnx::conv", _backward, setup_context=_setup_context)
