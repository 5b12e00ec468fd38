"""What is constant over the rows, folded into a matrix and its bias, and the gradients of all of it taken apart again.

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

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import aligned, rounded

THREADS = 128


@triton.jit
def fold_kernel(
    weight_ptr,  # (rows, columns)
    scale_ptr,  # (columns,) float32
    shift_ptr,  # (columns,) float32
    bias_ptr,  # (rows,) float32
    folded_ptr,  # (rows, columns)
    out_ptr,  # (rows,) float32
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """folded = weight * scale, out = bias + weight @ shift."""
    columns = aligned(columns, ALIGN)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    known = row < rows - first
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for c0 in range(0, columns, BLOCK_COLUMNS):
        column = c0 + tl.arange(0, BLOCK_COLUMNS)
        there = column < columns
        place = first * columns + (row[:, None] * columns + column[None, :])
        inside = known[:, None] & there[None, :]
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
        sums += weight * tl.load(shift_ptr + column, mask=there, other=0.0)[None, :]
        if HAS_SCALE:
            folded = weight * tl.load(scale_ptr + column, mask=there, other=0.0)[None, :]
            tl.store(folded_ptr + place, rounded(folded, folded_ptr.dtype.element_ty), mask=inside)
    out = tl.load(bias_ptr + first + row, mask=known, other=0.0) + tl.sum(sums, axis=1)
    tl.store(out_ptr + first + row, out, mask=known)


@triton.jit
def unfold_kernel(
    product_ptr,  # (rows, columns), in: P, out: gradient of the weight
    weight_ptr,  # (rows, columns)
    grad_bias_ptr,  # (rows,) float32: r
    scale_ptr,  # (columns,) float32
    shift_ptr,  # (columns,) float32
    partial_ptr,  # (2, row blocks, columns) float32
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """P becomes P * scale + r shift'; sums over the rows of a block of P * weight and of r * weight."""
    columns = aligned(columns, ALIGN)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = column < columns
    shift = tl.load(shift_ptr + column, mask=there, other=0.0)[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + column, mask=there, other=0.0)[None, :]
    of_scale = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    of_shift = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(1).to(tl.int64) * STEPS + step) * BLOCK_ROWS
        row = tl.arange(0, BLOCK_ROWS)
        known = row < rows - first
        place = first * columns + (row[:, None] * columns + column[None, :])
        inside = known[:, None] & there[None, :]
        product = tl.load(product_ptr + place, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_bias = tl.load(grad_bias_ptr + first + row, mask=known, other=0.0)[:, None]
        grad = product
        if HAS_SCALE:
            of_scale += product * weight
            grad = grad * scale
        of_shift += grad_bias * weight
        tl.store(product_ptr + place, rounded(grad + grad_bias * shift, product_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + tl.program_id(1) * columns + column
    tl.store(partial, tl.sum(of_scale, axis=0), mask=there)
    tl.store(partial + tl.num_programs(1) * columns, tl.sum(of_shift, axis=0), mask=there)


def fold(weight: Tensor, scale: Tensor | None, shift: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """W' in the dtype of `weight (N, K)` and b', float32 `(N,)`; `scale`, `shift` float32 `(K,)`, `bias` `(N,)`.
    Without `scale` W' is `weight` itself."""
    rows, columns = weight.shape
    folded, out = weight if scale is None else torch.empty_like(weight), torch.empty_like(bias)
    height, width = _block(weight)
    triton_launch.launch(
        fold_kernel,
        (triton_launch.blocks(rows, height),),
        weight,
        scale,
        shift,
        bias,
        folded,
        out,
        rows,
        columns,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=width,
        ALIGN=triton_launch.alignment(columns),
        HAS_SCALE=scale is not None,
        num_warps=THREADS // 32,
    )
    return folded, out


def unfold(
    product: Tensor, weight: Tensor, grad_bias: Tensor, scale: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those of W', `product (N, K)`, and of b', `grad_bias`, float32 `(N,)`.

    Returns:
        weight: `(N, K)`, in the memory of `product`.
        scale: float32 `(K,)`, zeros without `scale`.
        shift: float32 `(K,)`.
    """
    rows, columns = weight.shape
    height, width = _block(weight)
    steps = 8
    high = triton_launch.blocks(rows, height * steps)
    partial = torch.empty(2, high, columns, dtype=torch.float32, device=weight.device)
    triton_launch.launch(
        unfold_kernel,
        (triton_launch.blocks(columns, width), high),
        product,
        weight,
        grad_bias,
        scale,
        shift,
        partial,
        rows,
        columns,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=width,
        ALIGN=triton_launch.alignment(columns),
        STEPS=steps,
        HAS_SCALE=scale is not None,
        num_warps=THREADS // 32,
    )
    return product, partial[0].sum(0), partial[1].sum(0)


def _block(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a block: 16 bytes for each thread twice."""
    values = 2 * THREADS * 16 // weight.element_size()
    width = min(128, triton.next_power_of_2(weight.shape[1]))
    return max(1, values // width), width
