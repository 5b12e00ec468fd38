"""Submanifold depthwise convolution by the compiled CPU kernel (`csrc/cpu/kernels_depthwise.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table
from sparsecnx.tensor import SparseTensor


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows, C)` of the convolution of `x` with `weight (C, 1, kh, kw)`."""
    table = neighbour_table(x.layout, weight.shape[2:])
    bias = None if bias is None else bias.contiguous()
    return torch.ops.sparsecnx.depthwise_conv(x.features.contiguous(), weight.contiguous(), bias, table, x.layout.tile)


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::depthwise_conv")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: int) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("sparsecnx::depthwise_conv_weight_grad")
    def _(grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel_h: int, kernel_w: int) -> Tensor:
        return x.new_empty(x.shape[1], 1, kernel_h, kernel_w)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, table, tile = inputs
        ctx.save_for_backward(x, weight, table)
        ctx.tile = tile
        ctx.bias_dtype = None if bias is None else bias.dtype

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, table = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Active sites neighbour each other symmetrically: the adjoint is the flipped kernel.
            flipped = weight.flip(2, 3)
            grad_x = torch.ops.sparsecnx.depthwise_conv(grad, flipped, None, table, ctx.tile)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.sparsecnx.depthwise_conv_weight_grad(grad, x, table, ctx.tile, *weight.shape[2:])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None

    torch.library.register_autograd("sparsecnx::depthwise_conv", _backward, setup_context=_setup_context)
