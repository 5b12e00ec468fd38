"""Depthwise convolution on an explicit kernel map by the compiled CPU kernel (`csrc/cpu/kernels_mapped.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.geometry.kernel_map import MappedRows, turned


def mapped_depthwise_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    maps = (x.kernel_map.contiguous(), None if x.inverse_map is None else x.inverse_map.contiguous())
    bias = None if bias is None else bias.contiguous()
    return torch.ops.sparsecnx.mapped_depthwise_conv(x.features.contiguous(), weight.contiguous(), bias, *maps)


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::mapped_depthwise_conv")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
        return x.new_empty(kernel_map.shape[0], x.shape[1])

    @torch.library.register_fake("sparsecnx::mapped_depthwise_conv_weight_grad")
    def _(grad: Tensor, x: Tensor, kernel_map: Tensor) -> Tensor:
        return x.new_empty(kernel_map.shape[1], x.shape[1])

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, kernel_map, inverse_map = inputs
        ctx.save_for_backward(x, weight, kernel_map, inverse_map)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kernel_map, inverse_map = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The adjoint reads the map the other way: every input row gathers from the output rows that read it.
            inverse_map = turned(kernel_map, x.shape[0]) if inverse_map is None else inverse_map
            grad_x = torch.ops.sparsecnx.mapped_depthwise_conv(grad, weight, None, inverse_map, kernel_map)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.sparsecnx.mapped_depthwise_conv_weight_grad(grad, x, kernel_map)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None

    torch.library.register_autograd("sparsecnx::mapped_depthwise_conv", _backward, setup_context=_setup_context)
