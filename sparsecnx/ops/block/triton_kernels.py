"""The fused ConvNeXt V2 block in Triton.

With u = dwconv(x), û = (u - mean) / sqrt(var + eps) and everything that is constant over the rows folded into the
matrices (LayerNorm's scale and shift into the first, GRN's beta into the second bias; `triton_folding.py`):

    depthwise convolution           x -> û, rstd
    linear_gelu_kernel              a = û W1' + b1,  h = gelu(a), and the sums of h^2 over the rows of each group
    grn.response                    the sums -> s = 1 + gamma N, one scale per group and channel
    linear_scaled_kernel            y = x + d ((h s) W2' + b2)

Kept for backward: x, û, rstd, the sums of squares, and, unless it is recomputed, a. Backward goes over the hidden
layer twice, since the gradient of GRN's sums needs all rows of a group before any row can go on. There are kernels
for a that was kept, and for a that is computed again:

    *_sums_kernel                   t = d g W2, and the sums of t h
    grn.response_backward           the sums -> gradients of gamma and of the sums of squares, dq
    *_gradients_kernel              da = (t s + 2 h dq) gelu'(a), h s d, and the sums of da
    torch.mm                        the gradients of both matrices and of û
    layer_norm, depthwise           û -> u -> x, taps and bias

The depthwise steps are Triton's or those of CUDA C++, one or the other in forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import (
    aligned,
    channel_block,
    dot,
    gelu,
    gelu_and_slope,
    load,
    product_block,
    rounded,
    row_block,
    store,
)
from sparsecnx.backends.triton_launch import alignment, blocks, launch, processors, row_sizes
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.block.triton_folding import fold, unfold
from sparsecnx.ops.depthwise_convolution import cuda as depthwise_cuda
from sparsecnx.ops.depthwise_convolution import triton_kernels as depthwise_triton
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.ops.global_response_norm import triton_kernels as grn
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.ops.global_response_norm.triton_kernels import store_group_sums
from sparsecnx.ops.layer_normalization import triton_kernels as layer_norm
from sparsecnx.tensor import SparseTensor

# Up to this width the hidden layer is computed again in backward, three matrix products more, rather than keeping 4C of
# the 6C values a row would keep. By counts, not measured: docs/kernels.md.
RECOMPUTE_CHANNELS = 512

KEPT_ROWS, RECOMPUTED_ROWS = 32, 64  # of a block of the kernels of gradients

# The modules whose kernels can do the depthwise steps.
DEPTHWISE: dict[str, Any] = {"triton": depthwise_triton, "cuda": depthwise_cuda}


def _tuned(half: list[tuple[int, int | None]], single: tuple[int, int | None]) -> Any:
    """Return the decorator of a matrix product with these blocks, for 16 bits and for float32.

    A block is its columns, and the most registers of a thread where ptxas, left alone, spills one to get by with fewer.
    """

    def config(block_n: int, registers: int | None, num_stages: int) -> Any:
        return triton.Config({"BLOCK_N": block_n}, num_warps=8, num_stages=num_stages, maxnreg=registers)

    # float32 is multiplied in three parts, and two products have two accumulators: narrower blocks.
    return triton_launch.tuned([config(*block, 3) for block in half], [config(*single, 2)], key=["N", "K"])


@_tuned([(128, None), (64, None)], (64, None))
@triton.jit
def linear_gelu_kernel(
    x,  # (ROWS, K)
    weight,  # (N, K)
    bias,  # (N,) float32
    row_group,  # (ROWS,) int32
    pre,  # (ROWS, N): a, or None
    hidden,  # (ROWS, N): h
    partial,  # (row blocks + groups, N) float32
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N and K
):
    """a = x @ weight.T + bias, h = gelu(a), partial = staircase sums of h^2."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)
    i_block, o_n = product_block(ROWS, N, BLOCK_M, BLOCK_N)
    b_a = preactivation(x, weight, bias, i_block, o_n, ROWS, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    if pre is not None:
        tl.store(pre + i_row * N + o_h, b_a, mask=m_h)
    # From the rounded value, as backward finds it.
    b_h = rounded(gelu(b_a.to(tl.float32)), hidden.dtype.element_ty)
    tl.store(hidden + i_row * N + o_h, b_h, mask=m_h)
    b_h = b_h.to(tl.float32)
    store_group_sums(partial, b_h * b_h, row_group, i_block, o_n, ROWS, N, BLOCK_M)


@_tuned([(128, None), (64, None)], (64, None))
@triton.jit
def linear_scaled_kernel(
    hidden,  # (ROWS, K): h
    scale,  # (groups, K): s
    weight,  # (N, K)
    bias,  # (N,) float32
    residual,  # (ROWS, N)
    row_scale,  # (ROWS,) float32: d, or None
    row_group,  # (ROWS,) int32
    out,  # (ROWS, N)
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N and K
):
    """out = residual + d ((h s) @ weight.T + bias)."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)
    i_block, o_n = product_block(ROWS, N, BLOCK_M, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    i_row, o_r, m_r, o_hidden, _ = row_block(i_block, o_k, ROWS, K, BLOCK_M)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    p_hidden = hidden + i_row * K + o_hidden
    p_scale = scale + i_group[:, None] * K + o_k[None, :]
    p_weight = weight + (o_n[None, :] * K + o_k[:, None])
    b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        m_left = m_r[:, None]
        m_right = (o_n < N)[None, :]
        if not EVEN_K:
            m_left = m_left & (i_k + o_k < K)[None, :]
            m_right = m_right & (i_k + o_k < K)[:, None]
        b_scaled = rounded(load(p_hidden, m_left) * load(p_scale, m_left), hidden.dtype.element_ty)
        b_out = dot(b_scaled, tl.load(p_weight, mask=m_right, other=0.0), b_out, PRECISION)
        p_hidden += BLOCK_K
        p_scale += BLOCK_K
        p_weight += BLOCK_K
    b_out += load(bias + o_n, o_n < N)[None, :]
    i_row, o_r, m_r, o_out, m_out = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    if row_scale is not None:
        b_out = b_out * load(row_scale + i_row + o_r, m_r)[:, None]
    store(out + i_row * N + o_out, b_out + load(residual + i_row * N + o_out, m_out), m_out)


@_tuned([(128, None), (64, None)], (32, None))
@triton.jit
def kept_sums_kernel(
    grad,  # (ROWS, K): g
    weight2,  # (K, N): W2
    pre,  # (ROWS, N): a
    row_scale,  # (ROWS,) float32: d, or None
    row_group,  # (ROWS,) int32
    product,  # (ROWS, N): t
    partial,  # (row blocks + groups, N) float32
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N and K
):
    """t = d g @ W2, partial = staircase sums of t gelu(a)."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)
    i_block, o_n = product_block(ROWS, N, BLOCK_M, BLOCK_N)
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    b_a = tl.load(pre + i_row * N + o_h, mask=m_h, other=0.0)
    b_t = multiply(grad, weight2, i_block, o_n, ROWS, N, K, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    if row_scale is not None:
        b_t = b_t * load(row_scale + i_row + o_r, m_r)[:, None]
    b_t = rounded(b_t, product.dtype.element_ty)
    tl.store(product + i_row * N + o_h, b_t, mask=m_h)
    b_h = rounded(gelu(b_a.to(tl.float32)), b_a.dtype)
    b_sums = b_t.to(tl.float32) * b_h.to(tl.float32)
    store_group_sums(partial, b_sums, row_group, i_block, o_n, ROWS, N, BLOCK_M)


@_tuned([(64, 168)], (32, None))
@triton.jit
def recomputed_sums_kernel(
    grad,  # (ROWS, K): g
    weight2,  # (K, N): W2
    normalised,  # (ROWS, K): û
    weight1,  # (N, K): W1'
    bias1,  # (N,) float32: b1
    row_scale,  # (ROWS,) float32: d, or None
    row_group,  # (ROWS,) int32
    partial,  # (row blocks + groups, N) float32
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N and K
):
    """a = û @ W1'.T + b1, t = d g @ W2, partial = staircase sums of t gelu(a)."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)
    i_block, o_n = product_block(ROWS, N, BLOCK_M, BLOCK_N)
    b_a = preactivation(
        normalised, weight1, bias1, i_block, o_n, ROWS, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    b_t = multiply(grad, weight2, i_block, o_n, ROWS, N, K, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    if row_scale is not None:
        b_t = b_t * load(row_scale + i_row + o_r, m_r)[:, None]
    b_h = rounded(gelu(b_a.to(tl.float32)), b_a.dtype).to(tl.float32)
    store_group_sums(partial, b_t * b_h, row_group, i_block, o_n, ROWS, N, BLOCK_M)


@triton.jit
def kept_gradients_kernel(
    product,  # (ROWS, N): t
    pre,  # (ROWS, N): a
    scale,  # (groups, N) float32: s
    grad_energy,  # (groups, N) float32: dq
    row_scale,  # (ROWS,) float32: d, or None
    row_group,  # (ROWS,) int32
    grad_pre,  # (ROWS, N): da; may be the memory of t
    scaled,  # (ROWS, N): h s d
    partial,  # (row blocks, N) float32
    ROWS,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N
):
    """h = gelu(a), da = (t s + 2 h dq) gelu'(a), and h s d; partial = sums of da."""
    N = aligned(N, ALIGN)
    i_block, o_n = channel_block(N, BLOCK_N)
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    b_a = load(pre + i_row * N + o_h, m_h)
    b_t = load(product + i_row * N + o_h, m_h)
    # fmt: off
    store_gradients(
        b_a, b_t, scale, grad_energy, row_scale, row_group, grad_pre, scaled, partial, i_block, o_n, ROWS, N, BLOCK_M
    )
    # fmt: on


@_tuned([(64, None)], (32, None))
@triton.jit
def recomputed_gradients_kernel(
    grad,  # (ROWS, K): g
    weight2,  # (K, N): W2
    normalised,  # (ROWS, K): û
    weight1,  # (N, K): W1'
    bias1,  # (N,) float32: b1
    scale,  # (groups, N) float32: s
    grad_energy,  # (groups, N) float32: dq
    row_scale,  # (ROWS,) float32: d, or None
    row_group,  # (ROWS,) int32
    grad_pre,  # (ROWS, N): da
    scaled,  # (ROWS, N): h s d
    partial,  # (row blocks, N) float32
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of N and K
):
    """a = û @ W1'.T + b1, h = gelu(a), t = d g @ W2, da = (t s + 2 h dq) gelu'(a), and h s d; partial = sums of da."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)
    i_block, o_n = product_block(ROWS, N, BLOCK_M, BLOCK_N)
    b_a = preactivation(
        normalised, weight1, bias1, i_block, o_n, ROWS, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    ).to(tl.float32)
    b_t = multiply(grad, weight2, i_block, o_n, ROWS, N, K, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    if row_scale is not None:
        b_t = b_t * load(row_scale + i_row + o_r, m_r)[:, None]
    # fmt: off
    store_gradients(
        b_a, b_t, scale, grad_energy, row_scale, row_group, grad_pre, scaled, partial, i_block, o_n, ROWS, N, BLOCK_M
    )
    # fmt: on


@triton.jit
def store_gradients(
    b_a,
    b_t,
    scale,
    grad_energy,
    row_scale,
    row_group,
    grad_pre,
    scaled,
    partial,
    i_block,
    o_n,
    ROWS,
    N,
    BLOCK_M: tl.constexpr,
):
    """Store `da = (t s + 2 h dq) gelu'(a)`, h s d, and the sums of da over the rows of the block."""
    i_row, o_r, m_r, o_h, m_h = row_block(i_block, o_n, ROWS, N, BLOCK_M)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    b_scale = load(scale + i_group[:, None] * N + o_n[None, :], m_h)
    b_grad_energy = load(grad_energy + i_group[:, None] * N + o_n[None, :], m_h)
    b_h, b_slope = gelu_and_slope(b_a)
    b_h = rounded(b_h, grad_pre.dtype.element_ty).to(tl.float32)
    b_grad_pre = (b_t * b_scale + 2.0 * b_h * b_grad_energy) * b_slope
    b_scaled = b_h * b_scale
    if row_scale is not None:
        b_scaled = b_scaled * load(row_scale + i_row + o_r, m_r)[:, None]
    store(scaled + i_row * N + o_h, b_scaled, m_h)
    store(grad_pre + i_row * N + o_h, b_grad_pre, m_h)
    b_sums = tl.sum(tl.where(m_h, b_grad_pre, 0.0), axis=0)
    store(partial + i_block.to(tl.int64) * N + o_n, b_sums, o_n < N)


@triton.jit
def column_sums_kernel(
    x,  # (ROWS, C)
    row_scale,  # (ROWS,) float32: d, or None
    partial,  # (ranges, C) float32
    ROWS,
    C,
    blocks_per_program,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial = sums of x d over the rows of each range."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_step in range(0, blocks_per_program):
        i_block = tl.program_id(1) * blocks_per_program + i_step
        i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
        b_x = load(x + i_row * C + o_x, m_x)
        if row_scale is not None:
            b_x = b_x * load(row_scale + i_row + o_r, m_r)[:, None]
        b_sum += b_x
    store(partial + tl.program_id(1) * C + o_c, tl.sum(b_sum, axis=0), o_c < C)


@triton.jit
def multiply(
    left,  # (ROWS, K)
    right,  # right[k, n] at k * stride_k + n * stride_n
    i_block,
    o_n,
    ROWS,
    N,
    K,
    stride_k,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return columns `o_n` of a block of rows of `left @ right`, in float32."""
    o_k = tl.arange(0, BLOCK_K)
    i_row, _, m_r, o_left, _ = row_block(i_block, o_k, ROWS, K, BLOCK_M)
    p_left = left + i_row * K + o_left
    p_right = right + (o_k[:, None] * stride_k + o_n[None, :] * stride_n)
    b_product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        m_left = m_r[:, None]
        m_right = (o_n < N)[None, :]
        if not EVEN_K:
            m_left = m_left & (i_k + o_k < K)[None, :]
            m_right = m_right & (i_k + o_k < K)[:, None]
        b_left = tl.load(p_left, mask=m_left, other=0.0)
        b_right = tl.load(p_right, mask=m_right, other=0.0)
        b_product = dot(b_left, b_right, b_product, PRECISION)
        p_left += BLOCK_K
        p_right += BLOCK_K * stride_k
    return b_product


@triton.jit
def preactivation(
    left,  # (ROWS, K)
    weight,  # (N, K)
    bias,  # (N,) float32
    i_block,
    o_n,
    ROWS,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return columns `o_n` of a block of rows of `left @ weight.T + bias`, rounded to the dtype of the rows."""
    b_a = multiply(left, weight, i_block, o_n, ROWS, N, K, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    return rounded(b_a + load(bias + o_n, o_n < N)[None, :], left.dtype.element_ty)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, row_group: Tensor, groups: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `gelu(x @ weight.T + bias)`.

    Returns:
        hidden: `(rows, N)`.
        pre: what GELU was applied to, `(rows, N)`; without `keep` no rows.
        partial: staircase sums of the squares of hidden, float32 `(row blocks + groups, N)`.
    """
    rows, outputs, block_m = x.shape[0], weight.shape[0], _block_rows(x)
    hidden, pre = x.new_empty(rows, outputs), x.new_empty(rows if keep else 0, outputs)
    partial = grn.partial_sums(rows, groups, outputs, block_m, x)
    inputs = {"x": x, "weight": weight, "bias": bias, "row_group": row_group}
    outs = {"pre": pre if keep else None, "hidden": hidden, "partial": partial}
    _launch(linear_gelu_kernel, x, outputs, block_m, **inputs, **outs)
    return hidden, pre, partial


def linear_scaled(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    row_scale: Tensor | None,
    row_group: Tensor,
) -> Tensor:
    """Return `residual + row_scale * ((hidden * scale[row_group]) @ weight.T + bias)`, `(rows, N)`."""
    out = torch.empty_like(residual)
    _launch(
        linear_scaled_kernel,
        hidden,
        weight.shape[0],
        _block_rows(hidden),
        hidden=hidden,
        scale=scale.to(hidden.dtype),
        weight=weight,
        bias=bias,
        residual=residual,
        row_scale=row_scale,
        row_group=row_group,
        out=out,
    )
    return out


def column_sums(x: Tensor, row_scale: Tensor | None) -> Tensor:
    """Return the sum of the rows of `x (rows, C)`, each times its scale, float32 `(C,)`. In two stages."""
    rows, channels = x.shape
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = 32 * 4 * 16 // x.element_size() // block_c  # 16 bytes for each of 128 threads
    wide = blocks(channels, block_c)
    ranges = max(1, min(blocks(4 * processors(x.device), wide), rows // (8 * block_r)))
    blocks_per_program = blocks(blocks(rows, ranges), block_r)
    ranges = max(1, blocks(rows, blocks_per_program * block_r)) if rows else 1
    partial = torch.empty(ranges, channels, dtype=torch.float32, device=x.device)
    tensors = {"x": x, "row_scale": row_scale, "partial": partial}
    sizes = {"blocks_per_program": blocks_per_program, **row_sizes(rows, channels, block_r, block_c)}
    launch(column_sums_kernel, (wide, ranges), **tensors, **sizes, num_warps=4)
    return partial.sum(0)


def _launch(kernel: Any, left: Tensor, outputs: int, block_m: int, **tensors: Tensor | None) -> None:
    """Launch a kernel on blocks of a matrix `(rows, outputs)`, for products with the rows of `left (rows, K)`."""
    rows, channels = left.shape
    if rows == 0:
        return
    block_k = 64 if left.dtype != torch.float32 and channels % 64 == 0 else 32
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    high = blocks(rows, block_m)
    launch(
        kernel,
        lambda meta: (high * blocks(outputs, meta["BLOCK_N"]),),
        **tensors,
        ROWS=rows,
        N=outputs,
        K=channels,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        EVEN_K=channels % block_k == 0,
        PRECISION="tf32x3" if exact else "tf32",
        ALIGN=alignment(outputs, channels),
    )


def _block_rows(x: Tensor) -> int:
    """Return the rows of a block of the matrix products."""
    return 64 if x.dtype == torch.float32 else 128


def hidden_backward(
    grad: Tensor,
    p: BlockParameters,
    folded: tuple[Tensor, Tensor],
    row_scale: Tensor | None,
    row_group: Tensor,
    splits: Tensor,
    eps: float,
    normalised: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients through the second matrix, GRN and GELU.

    Args:
        folded: W1' and b1'.

    Returns:
        grad_pre: gradient of what GELU was applied to, `(rows, 4C)`.
        scaled: the hidden layer times scales of GRN and rows, `(rows, 4C)`.
        grad_gamma: float32 `(4C,)`.
        grad_bias1: float32 `(4C,)`, sum of the rows of grad_pre.
    """
    rows, (groups, hidden), kept = grad.shape[0], energy.shape, pre.shape[0] == grad.shape[0]
    by_row = {"row_scale": row_scale, "row_group": row_group}
    matrices = {"grad": grad, "weight2": p.pwconv2_weight}
    block_m = _block_rows(grad)
    partial = grn.partial_sums(rows, groups, hidden, block_m, grad)
    if kept:
        product = torch.empty_like(pre)
        tensors = {**matrices, "pre": pre, **by_row, "product": product}
        _launch(kept_sums_kernel, grad, hidden, block_m, **tensors, partial=partial)
    else:
        matrices |= {"normalised": normalised, "weight1": folded[0], "bias1": folded[1]}
        _launch(recomputed_sums_kernel, grad, hidden, block_m, **matrices, **by_row, partial=partial)
    grad_gamma, grad_energy, scale = grn.response_backward(partial, splits, block_m, energy, p.grn_gamma, eps)

    by_row |= {"scale": scale, "grad_energy": grad_energy}
    block_m = KEPT_ROWS if kept else RECOMPUTED_ROWS
    scaled = grad.new_empty(rows, hidden)
    grad_pre = product if kept else torch.empty_like(scaled)
    partial = grn.partial_sums(rows, 0, hidden, block_m, grad)
    outs = {"grad_pre": grad_pre, "scaled": scaled, "partial": partial}
    if kept:
        block_n, registers = 128, 255 if grad.dtype == torch.float32 else None
        grid = (blocks(rows, block_m) * blocks(hidden, block_n),)
        sizes = {"ROWS": rows, "N": hidden, "BLOCK_M": block_m, "BLOCK_N": block_n, "ALIGN": alignment(hidden)}
        tensors = {"product": product, "pre": pre, **by_row, **outs}
        launch(kept_gradients_kernel, grid, **tensors, **sizes, num_stages=1, maxnreg=registers)
    else:
        _launch(recomputed_gradients_kernel, grad, hidden, block_m, **matrices, **by_row, **outs)
    return grad_pre, scaled, grad_gamma, partial.sum(0)


def recomputes(x: SparseTensor, recompute: bool | None = None) -> bool:
    """Return whether backward computes the hidden layer again; by C where it is left open."""
    return x.features.shape[1] <= RECOMPUTE_CHANNELS if recompute is None else recompute


def detail(x: SparseTensor) -> str:
    """Return how the block runs on `x`, for those who ask."""
    return "hidden layer recomputed in backward" if recomputes(x) else "hidden layer kept for backward"


def convnextv2_block(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    recompute: bool | None,
    depthwise: str = "triton",
) -> Tensor:
    """Return features `(rows, C)` of the block; `recompute=None` decides by C, `depthwise` is one of `DEPTHWISE`."""
    if depthwise == "triton":
        depthwise_triton.check_kernel(p.dwconv_weight, "dwconv_weight")
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in (x.features, *p))
    keep = wanted and not recomputes(x, recompute)
    row_scale = None if survival is None else survival[x.layout.row_image()]
    table = neighbour_table(x.layout, p.dwconv_weight.shape[2:])
    places = row_scale, row_groups(x.layout, scope), table, group_splits(x.layout, scope), x.layout.tile
    p = p._replace(grn_gamma=p.grn_gamma.flatten(), grn_beta=p.grn_beta.flatten())
    features, parameters = x.features.contiguous(), [value.contiguous() for value in p]
    out, *_ = torch.ops.sparsecnx_triton.convnextv2_block(features, *parameters, *places, eps, depthwise, keep)
    return out


def _block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    grn_gamma: Tensor,
    grn_beta: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    row_scale: Tensor | None,
    row_group: Tensor,
    table: Tensor,
    splits: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the block's features, and what backward needs: normalised, rstd, energy, pre (no rows without `keep`)."""
    weight1, bias1 = fold(pwconv1_weight, norm_weight, norm_bias, pwconv1_bias)
    weight2, bias2 = fold(pwconv2_weight, None, grn_beta, pwconv2_bias)
    convolve = DEPTHWISE[depthwise].convolve
    normalised, rstd = convolve(x, dwconv_weight, dwconv_bias, table, tile, normalise=eps)
    hidden, pre, partial = linear_gelu(normalised, weight1, bias1, row_group, splits.shape[0] - 1, keep)
    energy, scale = grn.response(partial, splits, _block_rows(x), grn_gamma, eps)
    out = linear_scaled(hidden, scale, weight2, bias2, x, row_scale, row_group)
    return out, normalised, rstd, energy, pre


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, splits, _, _, _, keep = rest
    rows, hidden = x.shape[0], BlockParameters(*rest[:10]).pwconv1_weight.shape[0]
    rstd = x.new_empty(rows, dtype=torch.float32)
    energy = x.new_empty(splits.shape[0] - 1, hidden, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), rstd, energy, x.new_empty(rows if keep else 0, hidden)


def _block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_scale: Tensor | None,
    row_group: Tensor,
    table: Tensor,
    splits: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    normalised: Tensor,
    rstd: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> list[Tensor]:
    """Return the gradients of x and of the ten parameters."""
    p = BlockParameters(*parameters)
    folded = fold(p.pwconv1_weight, p.norm_weight, p.norm_bias, p.pwconv1_bias)
    grad_pre, scaled, grad_gamma, grad_bias1 = hidden_backward(
        grad, p, folded, row_scale, row_group, splits, eps, normalised, energy, pre
    )
    # pwconv2, whose input is h s + beta: `scaled` is h s times the scale of the rows.
    grad_bias2 = column_sums(grad, row_scale)
    product = torch.mm(grad.t(), scaled)
    grad_weight2, _, grad_beta = unfold(product, p.pwconv2_weight, grad_bias2, None, p.grn_beta)
    del scaled
    # pwconv1, whose input is û * norm_weight + norm_bias.
    product = torch.mm(grad_pre.t(), normalised)
    grad_weight1, grad_norm_weight, grad_norm_bias = unfold(
        product, p.pwconv1_weight, grad_bias1, p.norm_weight, p.norm_bias
    )
    grad_normalised = torch.mm(grad_pre, folded[0])
    del grad_pre
    grad_conv = layer_norm.normalised_backward(grad_normalised, normalised, rstd)
    kernels = DEPTHWISE[depthwise]
    grad_taps, grad_conv_bias = kernels.weight_grad(grad_conv, x, table, tile, tuple(p.dwconv_weight.shape[2:]))
    grad_x, _ = kernels.convolve(grad_conv, p.dwconv_weight, None, table, tile, residual=grad, flip=True)
    grads = BlockParameters(
        dwconv_weight=grad_taps,
        dwconv_bias=grad_conv_bias,
        norm_weight=grad_norm_weight,
        norm_bias=grad_norm_bias,
        pwconv1_weight=grad_weight1,
        pwconv1_bias=grad_bias1,
        grn_gamma=grad_gamma,
        grn_beta=grad_beta,
        pwconv2_weight=grad_weight2,
        pwconv2_bias=grad_bias2,
    )
    return [grad_x, *grads]


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    parameters = [getattr(saved, name) for name in BlockParameters._fields]
    places = saved.row_scale, saved.row_group, saved.table, saved.splits, saved.tile, saved.eps, saved.depthwise
    grads = torch.ops.sparsecnx_triton.convnextv2_block_backward(grad, saved.x, parameters, *places, *saved.outputs)
    return dict(zip(("x", *BlockParameters._fields), grads, strict=True))


SAVED = ("x", *BlockParameters._fields, "row_scale", "row_group", "table", "splits", "tile", "eps", "depthwise")
register("sparsecnx_triton::convnextv2_block", function=_block, fake=_fake, saves=SAVED, backward=_backward)
register(
    "sparsecnx_triton::convnextv2_block_backward",
    function=_block_backward,
    fake=lambda grad, x, parameters, *_: [torch.empty_like(value) for value in (x, *parameters)],
)
