"""Layer normalization by Triton kernels: a program holds whole rows, several of them where C is small."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, load, row_block, store
from sparsecnx.backends.triton_launch import blocks, launch, processors, row_sizes
from sparsecnx.tensor import SparseTensor

VALUES_PER_THREAD = 16
PROGRAMS_PER_PROCESSOR = 4  # of the backward kernel, each with sums over its own rows


@triton.jit
def layer_norm_kernel(
    x,  # (ROWS, C)
    weight,  # (C,) float32
    bias,  # (C,) float32
    out,  # (ROWS, C)
    moments,  # (ROWS, 2) float32: mean, rstd
    eps,
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C or more
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps)."""
    C = aligned(C, ALIGN)
    o_c = tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)

    b_x = load(x + i_row * C + o_x, m_x)
    # The variance is that of the deviations: no difference of large sums. Division and root are rounded correctly,
    # so that the mean of equal numbers is that number.
    b_mean = tl.div_rn(tl.sum(b_x, axis=1), C * 1.0)
    b_deviation = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_variance = tl.sum(b_deviation * b_deviation, axis=1) / C
    b_rstd = 1.0 / tl.sqrt_rn(b_variance + eps)
    b_weight = load(weight + o_c, o_c < C)
    b_bias = load(bias + o_c, o_c < C)
    b_out = b_deviation * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]

    store(out + i_row * C + o_x, b_out, m_x)
    store(moments + i_row * 2 + 2 * o_r, b_mean, m_r)
    store(moments + i_row * 2 + 2 * o_r + 1, b_rstd, m_r)


@triton.jit
def tangent(b_grad, b_normalised, C):
    """Return `grad - mean_c grad - normalised mean_c(grad normalised)`.

    Times rstd, this is the gradient of the row before it was normalised. Both blocks are 0 beyond the channels.
    """
    b_mean = tl.sum(b_grad, axis=1) / C
    b_along = tl.sum(b_grad * b_normalised, axis=1) / C
    return b_grad - b_mean[:, None] - b_normalised * b_along[:, None]


@triton.jit
def layer_norm_backward_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    weight,  # (C,) float32
    moments,  # (ROWS, 2) float32: mean, rstd
    grad_x,  # (ROWS, C)
    partial_weight,  # (programs, C) float32: sums of grad normalised over the rows of a program
    partial_bias,  # (programs, C) float32: sums of grad
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C or more
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_x = rstd tangent(grad weight), with normalised = (x - mean) rstd."""
    C = aligned(C, ALIGN)
    o_c = tl.arange(0, BLOCK_C)
    b_weight = load(weight + o_c, o_c < C)
    b_partial_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_partial_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_block in range(tl.program_id(0), tl.cdiv(ROWS, BLOCK_R), tl.num_programs(0)):
        i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
        b_x = load(x + i_row * C + o_x, m_x)
        b_grad = load(grad + i_row * C + o_x, m_x)
        b_mean = load(moments + i_row * 2 + 2 * o_r, m_r)
        b_rstd = load(moments + i_row * 2 + 2 * o_r + 1, m_r)
        b_normalised = tl.where(m_x, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_partial_weight += b_grad * b_normalised
        b_partial_bias += b_grad
        b_grad_x = tangent(b_grad * b_weight[None, :], b_normalised, C) * b_rstd[:, None]
        store(grad_x + i_row * C + o_x, b_grad_x, m_x)
    o_partial = tl.program_id(0).to(tl.int64) * C + o_c
    store(partial_weight + o_partial, tl.sum(b_partial_weight, axis=0), o_c < C)
    store(partial_bias + o_partial, tl.sum(b_partial_bias, axis=0), o_c < C)


@triton.jit
def normalised_backward_kernel(
    grad,  # (ROWS, C)
    normalised,  # (ROWS, C)
    rstd,  # (ROWS,) float32
    grad_x,  # (ROWS, C)
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C or more
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_x = rstd tangent(grad)."""
    C = aligned(C, ALIGN)
    o_c = tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_grad = load(grad + i_row * C + o_x, m_x)
    b_normalised = load(normalised + i_row * C + o_x, m_x)
    b_rstd = load(rstd + i_row + o_r, m_r)
    store(grad_x + i_row * C + o_x, tangent(b_grad, b_normalised, C) * b_rstd[:, None], m_x)


def normalised_backward(grad: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of x `(rows, C)`, in the dtype of `grad`, where `normalised = (x - mean) * rstd`:

        rstd * (grad - mean_c grad - normalised * mean_c(grad * normalised))

    Args:
        grad, normalised: `(rows, C)`, contiguous.
        rstd: float32 `(rows,)`.
    """
    grad_x, (programs, options) = torch.empty_like(grad), _options(*grad.shape)
    tensors = {"grad": grad, "normalised": normalised, "rstd": rstd, "grad_x": grad_x}
    launch(normalised_backward_kernel, (programs,), **tensors, **options)
    return grad_x


def _options(rows: int, channels: int) -> tuple[int, dict[str, int]]:
    """Return the number of blocks of rows, and the options of the kernels.

    A block holds whole rows. It has 4 warps, more for long rows, with VALUES_PER_THREAD values for each thread.
    """
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, 4 * 32 * VALUES_PER_THREAD // block_c)
    warps = max(4, min(32, block_c // (32 * VALUES_PER_THREAD)))
    return blocks(rows, block_r), {**row_sizes(rows, channels, block_r, block_c), "num_warps": warps}


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return features `(rows, C)`."""
    out, _ = torch.ops.sparsecnx_triton.layer_norm(x.features.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return out


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return features `(rows, C)`, and the moments of the rows `(rows, 2)`: mean, 1 / sqrt(var + eps)."""
    programs, options = _options(*x.shape)
    out, moments = torch.empty_like(x), weight.new_empty(x.shape[0], 2)
    tensors = {"x": x, "weight": weight, "bias": bias, "out": out, "moments": moments}
    launch(layer_norm_kernel, (programs,), **tensors, eps=eps, **options)
    return out, moments


def _layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    programs, options = _options(*x.shape)
    programs = min(programs, PROGRAMS_PER_PROCESSOR * processors(x.device))
    grad_x, partial = torch.empty_like(x), weight.new_empty(2, programs, x.shape[1])
    inputs = {"grad": grad, "x": x, "weight": weight, "moments": moments}
    outs = {"grad_x": grad_x, "partial_weight": partial[0], "partial_bias": partial[1]}
    launch(layer_norm_backward_kernel, (programs,), **inputs, **outs, **options)
    return grad_x, partial[0].sum(0), partial[1].sum(0)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads = torch.ops.sparsecnx_triton.layer_norm_backward(grad, saved.x, saved.weight, *saved.outputs)
    return dict(zip(("x", "weight", "bias"), grads, strict=True))


register(
    "sparsecnx_triton::layer_norm",
    sizes={"x": "rows C", "weight": "C", "bias": "C"},
    function=_layer_norm,
    fake=lambda x, weight, bias, eps: (torch.empty_like(x), weight.new_empty(x.shape[0], 2)),
    saves=("x", "weight"),
    backward=_backward,
)
register(
    "sparsecnx_triton::layer_norm_backward",
    public="layer_norm",
    function=_layer_norm_backward,
    fake=lambda grad, x, weight, moments: (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)),
)
