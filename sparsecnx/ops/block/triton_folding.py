"""Fold what is constant over the rows into a matrix and its bias, and take the gradients of all of it apart again.

A linear layer whose input is `z * scale + shift` is one with other parameters whose input is z:

    (z * scale + shift) @ W.T + b  =  z @ W'.T + b',      W' = W * scale,      b' = b + W @ shift

With P the gradient of W' and r that of b', both sums over the rows:

    gradient of W = P * scale + r shift',   of scale = column sums of P * W,   of shift = W.T @ r

so that LayerNorm's scale and shift, and GRN's shift, cost nothing that grows with the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.triton_functions import aligned, load, row_block, store
from sparsecnx.backends.triton_launch import blocks, launch, row_sizes

THREADS = 128
STEPS = 8  # blocks of rows that a program of `unfold_kernel` goes through


@triton.jit
def fold_kernel(
    weight,  # (ROWS, C)
    scale,  # (C,) float32, or None for ones
    shift,  # (C,) float32
    bias,  # (ROWS,) float32
    folded_weight,  # (ROWS, C), written where there is a scale
    folded_bias,  # (ROWS,) float32
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """folded_weight = weight * scale, folded_bias = bias + weight @ shift."""
    C = aligned(C, ALIGN)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
        b_weight = load(weight + i_row * C + o_x, m_x)
        b_sum += b_weight * load(shift + o_c, o_c < C)[None, :]
        if scale is not None:
            store(folded_weight + i_row * C + o_x, b_weight * load(scale + o_c, o_c < C)[None, :], m_x)
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < ROWS - i_row
    store(folded_bias + i_row + o_r, load(bias + i_row + o_r, m_r) + tl.sum(b_sum, axis=1), m_r)


@triton.jit
def unfold_kernel(
    weight,  # (ROWS, C)
    scale,  # (C,) float32, or None for ones
    shift,  # (C,) float32
    grad_bias,  # (ROWS,) float32: r
    grad_weight,  # (ROWS, C): in, P; out, the gradient of the weight
    partial_scale,  # (row blocks, C) float32: sums of P * weight
    partial_shift,  # (row blocks, C) float32: sums of r * weight
    ROWS,
    C,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_weight = P * scale + r shift', and the column sums of P * weight and r * weight."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_shift = load(shift + o_c, o_c < C)[None, :]
    if scale is not None:
        b_scale = load(scale + o_c, o_c < C)[None, :]
    b_partial_scale = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_partial_shift = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_step in range(STEPS):
        i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(1) * STEPS + i_step, o_c, ROWS, C, BLOCK_R)
        b_grad = load(grad_weight + i_row * C + o_x, m_x)
        b_weight = load(weight + i_row * C + o_x, m_x)
        b_grad_bias = load(grad_bias + i_row + o_r, m_r)[:, None]
        if scale is not None:
            b_partial_scale += b_grad * b_weight
            b_grad = b_grad * b_scale
        b_partial_shift += b_grad_bias * b_weight
        store(grad_weight + i_row * C + o_x, b_grad + b_grad_bias * b_shift, m_x)
    o_partial = tl.program_id(1) * C + o_c
    store(partial_scale + o_partial, tl.sum(b_partial_scale, axis=0), o_c < C)
    store(partial_shift + o_partial, tl.sum(b_partial_shift, axis=0), o_c < C)


def fold(weight: Tensor, scale: Tensor | None, shift: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return W' in the dtype of `weight (N, K)`, which is `weight` itself without `scale`, and b', float32 `(N,)`.

    Args:
        scale, shift: float32 `(K,)`.
        bias: float32 `(N,)`.
    """
    rows, columns = weight.shape
    folded_weight, folded_bias = weight if scale is None else torch.empty_like(weight), torch.empty_like(bias)
    block_r, block_c = _block(weight)
    inputs = {"weight": weight, "scale": scale, "shift": shift, "bias": bias}
    outs = {"folded_weight": folded_weight, "folded_bias": folded_bias}
    sizes = row_sizes(rows, columns, block_r, block_c)
    launch(fold_kernel, (blocks(rows, block_r),), **inputs, **outs, **sizes, num_warps=THREADS // 32)
    return folded_weight, folded_bias


def unfold(
    product: Tensor, weight: Tensor, grad_bias: Tensor, scale: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients from those of W', `product (N, K)`, and of b', `grad_bias`, float32 `(N,)`.

    Returns:
        weight: `(N, K)`, in the memory of `product`.
        scale: float32 `(K,)`, zeros without `scale`.
        shift: float32 `(K,)`.
    """
    rows, columns = weight.shape
    block_r, block_c = _block(weight)
    high = blocks(rows, block_r * STEPS)
    partial = torch.empty(2, high, columns, dtype=torch.float32, device=weight.device)
    inputs = {"weight": weight, "scale": scale, "shift": shift, "grad_bias": grad_bias}
    outs = {"grad_weight": product, "partial_scale": partial[0], "partial_shift": partial[1]}
    sizes = {"STEPS": STEPS, **row_sizes(rows, columns, block_r, block_c)}
    launch(unfold_kernel, (blocks(columns, block_c), high), **inputs, **outs, **sizes, num_warps=THREADS // 32)
    return product, partial[0].sum(0), partial[1].sum(0)


def _block(weight: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a block: 16 bytes for each thread twice."""
    values = 2 * THREADS * 16 // weight.element_size()
    block_c = min(128, triton.next_power_of_2(weight.shape[1]))
    return max(1, values // block_c), block_c
