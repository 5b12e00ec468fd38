"""Submanifold depthwise convolution by the CUDA kernels (`csrc/cuda/depthwise_conv.cuh` tells how they work)."""

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
    return torch.ops.sparsecnx_cuda.depthwise_conv(
        x.features.contiguous(), weight.contiguous(), bias, table, x.layout.tile
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    tile: int,
    *,
    residual: Tensor | None = None,
    flip: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution of rows, as `triton.convolve`.

    Args:
        x: `(rows, C)`.
        weight: `(C, 1, kh, kw)`, of the dtype of `x`.
        bias: float32 `(C,)` or None.
        table: of neighbouring tiles.
        tile: sites per tile side.
        residual: `(rows, C)`, added to the output.
        flip: with the kernel rotated by half a turn, as the gradient needs it.
        normalise: eps of a LayerNorm without scale and shift over the output, None for none.

    Returns:
        `(rows, C)`, and of the normalisation `1 / sqrt(variance + eps)`, float32 `(rows,)`, empty without it.
    """
    return torch.ops.sparsecnx_cuda.depthwise_conv_fused(x, weight, bias, residual, table, tile, flip, normalise)


def weight_grad(grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, `(C, 1, kh, kw)` in the dtype of `x`, and of the bias, float32 `(C,)`, from `grad` and
    `x`, `(rows, C)`."""
    return torch.ops.sparsecnx_cuda.depthwise_conv_weight_grad(grad, x, table, tile, *kernel)


if compiled.loaded:

    @torch.library.register_fake("sparsecnx_cuda::depthwise_conv")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: int) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("sparsecnx_cuda::depthwise_conv_fused")
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        table: Tensor,
        tile: int,
        flip: bool,
        eps: float | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(0 if eps is None else x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("sparsecnx_cuda::depthwise_conv_weight_grad")
    def _(grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel_h: int, kernel_w: int) -> tuple[Tensor, Tensor]:
        shape = (x.shape[1], 1, kernel_h, kernel_w)
        return x.new_empty(shape), x.new_empty(x.shape[1], dtype=torch.float32)

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
            if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
                grad_x = torch.ops.sparsecnx_cuda.depthwise_conv(grad, weight.flip(2, 3), None, table, ctx.tile)
            else:
                grad_x, _ = convolve(grad, weight, None, table, ctx.tile, flip=True)
        if ctx.needs_input_grad[1]:
            grad_weight, grad_bias = weight_grad(grad, x, table, ctx.tile, weight.shape[2:])
        elif ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias if ctx.bias_dtype is not None else None, None, None

    def _no_backward(*_: Any) -> None:
        raise NotImplementedError("gradients of a weight gradient, and of a fused convolution, are not offered")

    torch.library.register_autograd("sparsecnx_cuda::depthwise_conv", _backward, setup_context=_setup_context)
    for name in ("depthwise_conv_fused", "depthwise_conv_weight_grad"):
        torch.library.register_autograd(f"sparsecnx_cuda::{name}", _no_backward)
