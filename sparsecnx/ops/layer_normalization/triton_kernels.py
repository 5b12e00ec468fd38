"""Layer normalization by Triton kernels: a program holds whole rows, several of them where C is small."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import rounded
from sparsecnx.tensor import SparseTensor

VALUES_PER_THREAD = 16
PROGRAMS_PER_PROCESSOR = 4  # of the backward kernel, each with sums over its own rows


@triton.jit
def layer_norm_kernel(
    x_ptr,  # (rows, C)
    weight_ptr,  # float32 (C,)
    bias_ptr,  # float32 (C,)
    out_ptr,  # (rows, C), out: (x - mean) * rstd * weight + bias
    moments_ptr,  # float32 (rows, 2), out: mean, rstd = 1 / sqrt(var + eps)
    rows,
    C,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= C
    ALIGN: tl.constexpr,  # a divisor of C
):
    channels = C // ALIGN * ALIGN
    row0 = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
    # The variance is that of the deviations: no difference of large sums. Division and root are rounded correctly,
    # so that the mean of equal numbers is that number.
    mean = tl.div_rn(tl.sum(x, axis=1), channels * 1.0)
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(deviation * deviation, axis=1) / channels
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    weight = tl.load(weight_ptr + c, c < channels, 0.0)
    bias = tl.load(bias_ptr + c, c < channels, 0.0)
    out = deviation * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + base + offset, rounded(out, out_ptr.dtype.element_ty), inside)
    tl.store(moments_ptr + row0.to(tl.int64) * 2 + 2 * r, mean, known)
    tl.store(moments_ptr + row0.to(tl.int64) * 2 + 2 * r + 1, rstd, known)


@triton.jit
def tangent(grad, normalised, channels):
    """grad - mean_c grad - normalised * mean_c(grad * normalised), all `(rows, BLOCK_C)` and 0 beyond the channels:
    the gradient of the row before it was normalised, but for the factor rstd."""
    mean = tl.sum(grad, axis=1) / channels
    along = tl.sum(grad * normalised, axis=1) / channels
    return grad - mean[:, None] - normalised * along[:, None]


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    weight_ptr,  # float32 (C,)
    moments_ptr,  # float32 (rows, 2)
    grad_x_ptr,  # (rows, C), out
    weight_partial_ptr,  # float32 (programs, C), out: sums over the rows of a program of grad * xhat
    bias_partial_ptr,  # float32 (programs, C), out: the same of grad
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= C
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    offset = r[:, None] * channels + c[None, :]
    weight = tl.load(weight_ptr + c, c < channels, 0.0)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row0 = block * BLOCK_ROWS
        known = r < rows - row0
        inside = known[:, None] & (c < channels)[None, :]
        base = row0.to(tl.int64) * channels
        x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + offset, inside, 0.0).to(tl.float32)
        mean = tl.load(moments_ptr + row0.to(tl.int64) * 2 + 2 * r, known, 0.0)
        rstd = tl.load(moments_ptr + row0.to(tl.int64) * 2 + 2 * r + 1, known, 0.0)
        normalised = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += grad * normalised
        bias_sum += grad
        grad_x = tangent(grad * weight[None, :], normalised, channels) * rstd[:, None]
        tl.store(grad_x_ptr + base + offset, rounded(grad_x, grad_x_ptr.dtype.element_ty), inside)
    out = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(weight_partial_ptr + out, tl.sum(weight_sum, axis=0), c < channels)
    tl.store(bias_partial_ptr + out, tl.sum(bias_sum, axis=0), c < channels)


@triton.jit
def normalised_backward_kernel(
    grad_ptr,  # (rows, C)
    normalised_ptr,  # (rows, C)
    rstd_ptr,  # float32 (rows,)
    grad_x_ptr,  # (rows, C), out
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= C
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    row0 = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    grad = tl.load(grad_ptr + base + offset, inside, 0.0).to(tl.float32)
    normalised = tl.load(normalised_ptr + base + offset, inside, 0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row0 + r, known, 0.0)
    grad_x = tangent(grad, normalised, channels) * rstd[:, None]
    tl.store(grad_x_ptr + base + offset, rounded(grad_x, grad_x_ptr.dtype.element_ty), inside)


def normalised_backward(grad: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x where `normalised = (x - mean) * rstd`, row by row:

        rstd * (grad - mean_c grad - normalised * mean_c(grad * normalised))

    Args:
        grad, normalised: `(rows, C)`, contiguous.
        rstd: float32 `(rows,)`.

    Returns:
        `(rows, C)` in the dtype of `grad`.
    """
    rows, channels = grad.shape
    options = _block(channels)
    grad_x = torch.empty_like(grad)
    grid = (triton_launch.blocks(rows, options["BLOCK_ROWS"]),)
    triton_launch.launch(normalised_backward_kernel, grid, grad, normalised, rstd, grad_x, rows, channels, **options)
    return grad_x


def _block(channels: int) -> dict[str, int]:
    """Options of the kernels: whole rows, 4 warps of threads with VALUES_PER_THREAD values each, more of them for
    long rows."""
    block_c = triton.next_power_of_2(channels)
    at_once = max(1, 4 * 32 * VALUES_PER_THREAD // block_c)
    warps = max(4, min(32, block_c // (32 * VALUES_PER_THREAD)))
    return {"BLOCK_ROWS": at_once, "BLOCK_C": block_c, "ALIGN": math.gcd(channels, 16), "num_warps": warps}


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return features `(rows, C)`."""
    out, _ = layer_norm_forward(x.features.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return out


@torch.library.custom_op("sparsecnx_triton::layer_norm", mutates_args=())
def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return features `(rows, C)`, and the moments of the rows `(rows, 2)`: mean, 1 / sqrt(var + eps)."""
    rows, channels = x.shape
    options = _block(channels)
    out, moments = torch.empty_like(x), weight.new_empty(rows, 2)
    grid = (triton_launch.blocks(rows, options["BLOCK_ROWS"]),)
    triton_launch.launch(layer_norm_kernel, grid, x, weight, bias, out, moments, rows, channels, eps, **options)
    return out, moments


@layer_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[0], 2)


@torch.library.custom_op("sparsecnx_triton::layer_norm_backward", mutates_args=())
def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    rows, channels = x.shape
    options = _block(channels)
    programs = min(
        triton_launch.blocks(rows, options["BLOCK_ROWS"]), PROGRAMS_PER_PROCESSOR * triton_launch.processors(x.device)
    )
    grad_x = torch.empty_like(x)
    weight_partial, bias_partial = weight.new_empty(programs, channels), weight.new_empty(programs, channels)
    triton_launch.launch(
        layer_norm_backward_kernel,
        (programs,),
        grad,
        x,
        weight,
        moments,
        grad_x,
        weight_partial,
        bias_partial,
        rows,
        channels,
        **options,
    )
    return grad_x, weight_partial.sum(0), bias_partial.sum(0)


@layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *layer_norm_backward(grad.contiguous(), *ctx.saved_tensors), None


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)
