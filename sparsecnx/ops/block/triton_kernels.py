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

The kernels of the block alone are here, those of backward after those of forward. `triton_block.py` launches them all.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sparsecnx.backends import triton_launch
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
from sparsecnx.ops.global_response_norm.triton_kernels import store_group_sums


def _tuned(half: list[tuple[int, int | None]], single: tuple[int, int | None]) -> Any:
    """Return the decorator of a matrix product with these blocks, for 16 bits and for float32.

    A block is given by its columns and the registers that ptxas may use for a thread. With None ptxas decides. Where
    there is a number, ptxas would decide on fewer and spill one.
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
