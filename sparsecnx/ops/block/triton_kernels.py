"""The fused ConvNeXt V2 block in Triton.

With u = dwconv(x), û = (u - mean) / sqrt(var + eps) and everything that is constant over the rows folded into the
matrices (LayerNorm's scale and shift into the first, GRN's beta into the second bias):

    depthwise convolution     x -> û, rstd
    linear_gelu_kernel        a = û W1' + b1,  h = gelu(a), and for GRN the sums of h^2 over the rows of each group
    grn.response              the sums -> s = 1 + gamma N, one scale per group and channel
    linear_scaled_kernel      y = x + d ((h s) W2' + b2)

Kept for backward: x, û, rstd, the sums of squares, and, unless it is recomputed, a. Backward goes over the hidden
layer twice, since the gradient of GRN's sums needs all rows of a group before any row can go on:

    hidden_backward_kernel    t = d g W2, and the sums of t h                                   (SUMS)
    grn.response_backward     the sums -> gradients of gamma and of the sums of squares, dq
    hidden_backward_kernel    da = (t s + 2 h dq) gelu'(a), h s d, and the sums of da           (GRADIENTS)
    torch.mm                  the gradients of both matrices and of û
    layer_norm, depthwise     û -> u -> x, taps and bias

The depthwise steps are Triton's or those of CUDA C++, one or the other in forward and backward.

`triton_folding.py` folds, and finds the gradients of LayerNorm's scale and shift in those of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import aligned, dot, gelu, gelu_and_slope, grouped_blocks, rounded
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.block.triton_folding import fold, unfold
from sparsecnx.ops.depthwise_convolution import cuda as depthwise_cuda
from sparsecnx.ops.depthwise_convolution import triton_kernels as depthwise_triton
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.ops.global_response_norm import triton_kernels as grn
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.ops.layer_normalization import triton_kernels as layer_norm
from sparsecnx.tensor import SparseTensor

# Up to this width the hidden layer is computed again in backward, three matrix products more, rather than keeping 4C of
# the 6C values a row would keep. By counts, not measured: docs/kernels.md.
RECOMPUTE_CHANNELS = 512

GROUP = 8  # block rows that share the second operand
# Rows of a block of the second pass over the hidden layer: elementwise where it was kept, else two products.
GRADIENT_ROWS = {True: 32, False: 64}

# The modules whose kernels can do the depthwise steps.
DEPTHWISE: dict[str, Any] = {"triton": depthwise_triton, "cuda": depthwise_cuda}

ONE_PRODUCT = [
    triton.Config({"BLOCK_N": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=3),
]
TWO_PRODUCTS = [triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=3)]
TWO_PRODUCTS_AND_SUMS = [triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=3, maxnreg=168)]
NO_PRODUCT = [triton.Config({"BLOCK_N": 128}, num_warps=4, num_stages=1)]
FLOAT32 = [triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=2)]
NARROW_FLOAT32 = [triton.Config({"BLOCK_N": 32}, num_warps=8, num_stages=2)]


def _configurations(configs: list[Any], arguments: dict[str, Any], **options: Any) -> list[Any]:
    """Those that fit into the registers. float32 is multiplied in three parts, two products have two accumulators, and
    backward has more to hold beside them."""
    kept = options.get("KEPT", True)
    if options.get("GRADIENTS") and kept:
        return NO_PRODUCT
    if next(iter(arguments.values())).dtype == torch.float32:
        return NARROW_FLOAT32 if "KEPT" in options else FLOAT32
    if kept:
        return ONE_PRODUCT
    return TWO_PRODUCTS if options["GRADIENTS"] else TWO_PRODUCTS_AND_SUMS


tuned = triton_launch.tuned(
    [*ONE_PRODUCT, *TWO_PRODUCTS, *NO_PRODUCT, *FLOAT32, *NARROW_FLOAT32], ["N", "K"], _configurations
)


@tuned
@triton.jit
def linear_gelu_kernel(
    x_ptr,  # (rows, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) float32
    group_ptr,  # (rows,) int32
    pre_ptr,  # (rows, N): a
    hidden_ptr,  # (rows, N): h
    partial_ptr,  # (row blocks + groups, N) float32
    rows,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a = x @ weight.T + bias, h = gelu(a), staircase sums of h^2; a is written with KEEP alone."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)  # noqa: N806
    block_m, block_n = grouped_blocks(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first = block_m.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    known = row < rows - first
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = _product(
        x_ptr + first * K, weight_ptr, known, column, N, K, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
    pre = rounded(accumulator + bias[None, :], hidden_ptr.dtype.element_ty)
    inside = known[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    if KEEP:
        tl.store(pre_ptr + first * N + place, pre, mask=inside)
    # From the rounded value, as backward finds it.
    hidden = rounded(gelu(pre.to(tl.float32)), hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + first * N + place, hidden, mask=inside)
    values = hidden.to(tl.float32)
    _group_sums(values * values, partial_ptr, group_ptr + first, block_m, known, column, N, BLOCK_M)


@tuned
@triton.jit
def linear_scaled_kernel(
    hidden_ptr,  # (rows, K)
    scale_ptr,  # (groups, K), in the dtype of hidden
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) float32
    residual_ptr,  # (rows, N)
    row_scale_ptr,  # (rows,) float32
    group_ptr,  # (rows,) int32
    out_ptr,  # (rows, N)
    rows,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = residual + row_scale * ((hidden * scale[group]) @ weight.T + bias)."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)  # noqa: N806
    block_m, block_n = grouped_blocks(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first = block_m.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    known = row < rows - first
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.load(group_ptr + first + row, mask=known, other=0)
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + first * K + (row[:, None] * K + k[None, :])
    scale_at = scale_ptr + group.to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + (column[None, :] * K + k[:, None])
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        left = known[:, None]
        right = (column < N)[None, :]
        if not EVEN_K:
            left = left & (k0 + k < K)[None, :]
            right = right & (k0 + k < K)[:, None]
        hidden = tl.load(hidden_at, mask=left, other=0.0)
        scale = tl.load(scale_at, mask=left, other=0.0)
        weight = tl.load(weight_at, mask=right, other=0.0)
        scaled = rounded(hidden.to(tl.float32) * scale.to(tl.float32), hidden.dtype)
        accumulator = dot(scaled, weight, accumulator, PRECISION)
        hidden_at += BLOCK_K
        scale_at += BLOCK_K
        weight_at += BLOCK_K
    out = accumulator + tl.load(bias_ptr + column, mask=column < N, other=0.0)[None, :]
    if HAS_ROW_SCALE:
        out = out * tl.load(row_scale_ptr + first + row, mask=known, other=0.0)[:, None]
    inside = known[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    out += tl.load(residual_ptr + first * N + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + first * N + place, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@tuned
@triton.jit
def hidden_backward_kernel(
    grad_ptr,  # (rows, K): g
    weight2_ptr,  # (K, N): W2
    x_ptr,  # (rows, K): û
    weight1_ptr,  # (N, K): W1'
    bias1_ptr,  # (N,) float32
    row_scale_ptr,  # (rows,) float32
    group_ptr,  # (rows,) int32
    pre_ptr,  # (rows, N): a, read with KEPT
    product_ptr,  # (rows, N): t, with KEPT written by SUMS and read by GRADIENTS
    scale_ptr,  # (groups, N) float32: s
    grad_energy_ptr,  # (groups, N) float32: dq
    grad_pre_ptr,  # (rows, N): da; may be the memory of t
    scaled_ptr,  # (rows, N): h s d
    partial_ptr,  # float32: SUMS (row blocks + groups, N), GRADIENTS (row blocks, N)
    rows,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRADIENTS: tl.constexpr,
    KEPT: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A pass over the hidden layer in backward, see the top of this file."""
    N, K = aligned(N, ALIGN), aligned(K, ALIGN)  # noqa: N806
    block_m, block_n = grouped_blocks(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first = block_m.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    known = row < rows - first
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = known[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    if KEPT:
        pre = tl.load(pre_ptr + first * N + place, mask=inside, other=0.0)
    else:
        left_ptr = x_ptr + first * K
        pre = _product(left_ptr, weight1_ptr, known, column, N, K, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
        bias = tl.load(bias1_ptr + column, mask=column < N, other=0.0)
        pre = rounded(pre + bias[None, :], x_ptr.dtype.element_ty)
    if KEPT and GRADIENTS:
        product = tl.load(product_ptr + first * N + place, mask=inside, other=0.0).to(tl.float32)
    else:
        left_ptr = grad_ptr + first * K
        product = _product(
            left_ptr, weight2_ptr, known, column, N, K, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
    if HAS_ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + first + row, mask=known, other=0.0)[:, None]
        if not (KEPT and GRADIENTS):
            product = product * row_scale

    if GRADIENTS:
        group = tl.load(group_ptr + first + row, mask=known, other=0)
        by_group = group.to(tl.int64)[:, None] * N + column[None, :]
        scale = tl.load(scale_ptr + by_group, mask=inside, other=0.0)
        grad_energy = tl.load(grad_energy_ptr + by_group, mask=inside, other=0.0)
        hidden, slope = gelu_and_slope(pre.to(tl.float32))
        hidden = rounded(hidden, grad_pre_ptr.dtype.element_ty).to(tl.float32)
        grad_pre = (product * scale + 2.0 * hidden * grad_energy) * slope
        scaled = hidden * scale
        if HAS_ROW_SCALE:
            scaled = scaled * row_scale
        tl.store(scaled_ptr + first * N + place, rounded(scaled, scaled_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_pre_ptr + first * N + place, rounded(grad_pre, grad_pre_ptr.dtype.element_ty), mask=inside)
        sums = tl.sum(tl.where(inside, grad_pre, 0.0), axis=0)
        tl.store(partial_ptr + block_m.to(tl.int64) * N + column, sums, mask=column < N)
    else:
        if KEPT:
            stored = rounded(product, product_ptr.dtype.element_ty)
            tl.store(product_ptr + first * N + place, stored, mask=inside)
            product = stored.to(tl.float32)
        hidden = rounded(gelu(pre.to(tl.float32)), pre.dtype).to(tl.float32)
        _group_sums(product * hidden, partial_ptr, group_ptr + first, block_m, known, column, N, BLOCK_M)


@triton.jit
def column_sums_kernel(
    values_ptr,  # (rows, C)
    row_scale_ptr,  # (rows,) float32
    partial_ptr,  # (ranges, C) float32
    rows,
    C,
    rows_per_program,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """Sums of the rows of a range, each times its scale."""
    C = aligned(C, ALIGN)  # noqa: N806
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(1).to(tl.int64) * rows_per_program
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, rows_per_program, BLOCK_M):
        row = begin + first + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        values = tl.load(values_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_ROW_SCALE:
            values = values * tl.load(row_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        sums += values
    tl.store(partial_ptr + tl.program_id(1) * C + column, tl.sum(sums, axis=0), mask=column < C)


@triton.jit
def _product(
    left_ptr,
    right_ptr,
    known,
    column,
    N,
    K,
    right_stride_k,
    right_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of `left @ right`, left `(BLOCK_M, K)` and right[k, n] at `k * right_stride_k + n * right_stride_n`.
    Rows that are not `known` and columns from N on are not read."""
    k = tl.arange(0, BLOCK_K)
    left_at = left_ptr + (tl.arange(0, BLOCK_M)[:, None] * K + k[None, :])
    right_at = right_ptr + (k[:, None] * right_stride_k + column[None, :] * right_stride_n)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        left_inside = known[:, None]
        right_inside = (column < N)[None, :]
        if not EVEN_K:
            left_inside = left_inside & (k0 + k < K)[None, :]
            right_inside = right_inside & (k0 + k < K)[:, None]
        left = tl.load(left_at, mask=left_inside, other=0.0)
        right = tl.load(right_at, mask=right_inside, other=0.0)
        accumulator = dot(left, right, accumulator, PRECISION)
        left_at += BLOCK_K
        right_at += BLOCK_K * right_stride_k
    return accumulator


@triton.jit
def _group_sums(values, partial_ptr, group_ptr, block_m, known, column, N, BLOCK_M: tl.constexpr):
    """Sums over the rows of each group that has rows in this block: the slots `block + group` of the staircase."""
    group = tl.load(group_ptr + tl.arange(0, BLOCK_M), mask=known, other=-1)
    for present in range(tl.load(group_ptr), tl.max(group, axis=0) + 1):
        sums = tl.sum(tl.where((group == present)[:, None], values, 0.0), axis=0)
        slot = (block_m + present).to(tl.int64)
        tl.store(partial_ptr + slot * N + column, sums, mask=column < N)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, row_group: Tensor, groups: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`h = gelu(x @ weight.T + bias)`.

    Returns:
        hidden: `(rows, N)`.
        pre: what GELU was applied to, `(rows, N)`; without `keep` no rows.
        partial: staircase sums of h^2, float32 `(row blocks + groups, N)`.
    """
    rows, channels = x.shape
    outputs = weight.shape[0]
    hidden, pre = x.new_empty(rows, outputs), x.new_empty(rows if keep else 0, outputs)
    height = _block_rows(x)
    partial = grn.partial_sums(rows, groups, outputs, height, x)
    _launch(
        linear_gelu_kernel,
        rows,
        outputs,
        channels,
        (x, weight, bias, row_group, pre, hidden, partial),
        BLOCK_M=height,
        KEEP=keep,
    )
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
    """`residual + row_scale * ((hidden * scale[row_group]) @ weight.T + bias)`, `(rows, N)`."""
    rows, channels = hidden.shape
    out = torch.empty_like(residual)
    _launch(
        linear_scaled_kernel,
        rows,
        weight.shape[0],
        channels,
        (hidden, scale.to(hidden.dtype), weight, bias, residual, row_scale, row_group, out),
        BLOCK_M=_block_rows(hidden),
        HAS_ROW_SCALE=row_scale is not None,
    )
    return out


def column_sums(values: Tensor, row_scale: Tensor | None) -> Tensor:
    """Sum of the rows of `values (rows, C)`, each times its scale, float32 `(C,)`. In two stages."""
    rows, channels = values.shape
    block_c = min(128, triton.next_power_of_2(channels))
    height = 32 * 4 * 16 // values.element_size() // block_c  # 16 bytes for each of 128 threads
    wide = triton_launch.blocks(channels, block_c)
    ranges = max(1, min(triton_launch.blocks(4 * triton_launch.processors(values.device), wide), rows // (8 * height)))
    per_program = triton_launch.blocks(triton_launch.blocks(rows, ranges), height) * height
    ranges = max(1, triton_launch.blocks(rows, per_program)) if rows else 1
    partial = torch.empty(ranges, channels, dtype=torch.float32, device=values.device)
    triton_launch.launch(
        column_sums_kernel,
        (wide, ranges),
        values,
        row_scale,
        partial,
        rows,
        channels,
        per_program,
        BLOCK_M=height,
        BLOCK_C=block_c,
        ALIGN=triton_launch.alignment(channels),
        HAS_ROW_SCALE=row_scale is not None,
        num_warps=4,
    )
    return partial.sum(0)


def _launch(kernel: Any, rows: int, outputs: int, channels: int, tensors: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel on blocks of a hidden layer or an output `(rows, outputs)`, products over `channels`."""
    if rows == 0:
        return
    dtype = tensors[0].dtype
    block_k = 64 if dtype != torch.float32 and channels % 64 == 0 else 32
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    high = triton_launch.blocks(rows, options["BLOCK_M"])
    triton_launch.launch(
        kernel,
        lambda meta: (high * triton_launch.blocks(outputs, meta["BLOCK_N"]),),
        *tensors,
        rows,
        outputs,
        channels,
        BLOCK_K=block_k,
        EVEN_K=channels % block_k == 0,
        PRECISION="tf32x3" if exact else "tf32",
        ALIGN=triton_launch.alignment(outputs, channels),
        GROUP=GROUP,
        **options,
    )


def _block_rows(x: Tensor) -> int:
    """Rows of a block of the matrix products."""
    return 64 if x.dtype == torch.float32 else 128


def forward(
    x: Tensor,
    p: BlockParameters,
    row_scale: Tensor | None,
    row_group: Tensor,
    table: Tensor,
    segments: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Output of the block, and what backward needs: normalised, rstd, energy, pre (no rows without `keep`)."""
    weight1, bias1 = fold(p.pwconv1_weight, p.norm_weight, p.norm_bias, p.pwconv1_bias)
    weight2, bias2 = fold(p.pwconv2_weight, None, p.grn_beta, p.pwconv2_bias)
    convolve = DEPTHWISE[depthwise].convolve
    normalised, rstd = convolve(x, p.dwconv_weight, p.dwconv_bias, table, tile, normalise=eps)
    groups = segments.shape[0] - 1
    hidden, pre, partial = linear_gelu(normalised, weight1, bias1, row_group, groups, keep)
    energy, scale = grn.response(partial, segments, _block_rows(x), p.grn_gamma, eps)
    out = linear_scaled(hidden, scale, weight2, bias2, x, row_scale, row_group)
    return out, normalised, rstd, energy, pre


def backward(
    grad: Tensor,
    x: Tensor,
    p: BlockParameters,
    row_scale: Tensor | None,
    row_group: Tensor,
    table: Tensor,
    segments: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    normalised: Tensor,
    rstd: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the ten parameters."""
    folded = fold(p.pwconv1_weight, p.norm_weight, p.norm_bias, p.pwconv1_bias)
    grad_pre, scaled, grad_gamma, grad_bias1 = hidden_backward(
        grad, p, folded, row_scale, row_group, segments, eps, normalised, energy, pre
    )
    # pwconv2, whose input is h s + beta: `scaled` is h s times the scale of the rows.
    grad_bias2 = column_sums(grad, row_scale)
    product = torch.mm(grad.t(), scaled)
    grad_second, _, grad_beta = unfold(product, p.pwconv2_weight, grad_bias2, None, p.grn_beta)
    del scaled
    # pwconv1, whose input is û * norm_weight + norm_bias.
    product = torch.mm(grad_pre.t(), normalised)
    grad_first, grad_norm_weight, grad_norm_bias = unfold(
        product, p.pwconv1_weight, grad_bias1, p.norm_weight, p.norm_bias
    )
    grad_normalised = torch.mm(grad_pre, folded[0])
    del grad_pre
    grad_conv = layer_norm.normalised_backward(grad_normalised, normalised, rstd)
    kernel = (p.dwconv_weight.shape[2], p.dwconv_weight.shape[3])
    room = DEPTHWISE[depthwise]
    grad_taps, grad_conv_bias = room.weight_grad(grad_conv, x, table, tile, kernel)
    grad_x, _ = room.convolve(grad_conv, p.dwconv_weight, None, table, tile, residual=grad, flip=True)
    return (
        grad_x,
        grad_taps,
        grad_conv_bias,
        grad_norm_weight,
        grad_norm_bias,
        grad_first,
        grad_bias1,
        grad_gamma,
        grad_beta,
        grad_second,
        grad_bias2,
    )


def hidden_backward(
    grad: Tensor,
    p: BlockParameters,
    folded: tuple[Tensor, Tensor],
    row_scale: Tensor | None,
    row_group: Tensor,
    segments: Tensor,
    eps: float,
    normalised: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward through the second matrix, GRN and GELU.

    Args:
        folded: W1' and b1'.

    Returns:
        grad_pre: gradient of what GELU was applied to, `(rows, 4C)`.
        scaled: the hidden layer times scales of GRN and rows, `(rows, 4C)`.
        grad_gamma: float32 `(4C,)`.
        grad_bias1: float32 `(4C,)`, sum of the rows of grad_pre.
    """
    rows, channels = grad.shape
    hidden, groups = energy.shape[1], energy.shape[0]
    kept = pre.shape[0] == rows
    options = {"KEPT": kept, "HAS_ROW_SCALE": row_scale is not None}
    product = grad.new_empty(rows if kept else 0, hidden)
    first = (grad, p.pwconv2_weight, normalised, *folded, row_scale, row_group, pre, product)
    height = _block_rows(grad)
    partial = grn.partial_sums(rows, groups, hidden, height, grad)
    nothing = (None,) * 4
    _launch(
        hidden_backward_kernel,
        rows,
        hidden,
        channels,
        (*first, *nothing, partial),
        BLOCK_M=height,
        GRADIENTS=False,
        **options,
    )
    grad_gamma, grad_energy, scale = grn.response_backward(partial, segments, height, energy, p.grn_gamma, eps)
    height = GRADIENT_ROWS[kept]
    grad_pre, scaled = product if kept else grad.new_empty(rows, hidden), grad.new_empty(rows, hidden)
    partial = torch.empty(triton_launch.blocks(rows, height), hidden, dtype=torch.float32, device=grad.device)
    _launch(
        hidden_backward_kernel,
        rows,
        hidden,
        channels,
        (*first, scale, grad_energy, grad_pre, scaled, partial),
        BLOCK_M=height,
        GRADIENTS=True,
        **options,
    )
    return grad_pre, scaled, grad_gamma, partial.sum(0)


def recomputes(x: SparseTensor, recompute: bool | None = None) -> bool:
    """Whether backward computes the hidden layer again; by C where it is left open."""
    return x.features.shape[1] <= RECOMPUTE_CHANNELS if recompute is None else recompute


def detail(x: SparseTensor) -> str:
    """How the block runs on `x`, for those who ask."""
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
    row_group, segments = row_groups(x.layout, scope), group_splits(x.layout, scope)
    table = neighbour_table(x.layout, p.dwconv_weight.shape[2:])
    features, parameters = x.features.contiguous(), [value.contiguous() for value in p]
    places = row_scale, row_group, table, segments
    out, *_ = _block(features, *parameters, *places, x.layout.tile, eps, depthwise, keep)
    return out


@torch.library.custom_op("sparsecnx_triton::convnextv2_block", mutates_args=())
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
    segments: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = BlockParameters(
        dwconv_weight,
        dwconv_bias,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        grn_gamma,
        grn_beta,
        pwconv2_weight,
        pwconv2_bias,
    )
    out, normalised, rstd, energy, pre = forward(
        x, p, row_scale, row_group, table, segments, tile, eps, depthwise, keep
    )
    return out, normalised, rstd, energy, pre


@torch.library.custom_op("sparsecnx_triton::convnextv2_block_backward", mutates_args=())
def _block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_scale: Tensor | None,
    row_group: Tensor,
    table: Tensor,
    segments: Tensor,
    tile: int,
    eps: float,
    depthwise: str,
    normalised: Tensor,
    rstd: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> list[Tensor]:
    saved = normalised, rstd, energy, pre
    p = BlockParameters(*parameters)
    return list(backward(grad, x, p, row_scale, row_group, table, segments, tile, eps, depthwise, *saved))


@_block.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    p = BlockParameters(*rest[:10])
    segments, keep = rest[13], rest[17]
    rows, hidden = x.shape[0], p.pwconv1_weight.shape[0]
    rstd = x.new_empty(rows, dtype=torch.float32)
    energy = x.new_empty(segments.shape[0] - 1, hidden, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), rstd, energy, x.new_empty(rows if keep else 0, hidden)


@_block_backward.register_fake
def _(grad: Tensor, x: Tensor, parameters: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(parameter) for parameter in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters = inputs[:11]
    row_scale, row_group, table, segments, ctx.tile, ctx.eps, ctx.depthwise, _ = inputs[11:]
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # zeros in the shape of the hidden layer, which nobody reads
    ctx.save_for_backward(x, *parameters, row_scale, row_group, table, segments, *saved)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 19
    x, *rest = ctx.saved_tensors
    parameters, places, saved = rest[:10], rest[10:14], rest[14:]
    grads = _block_backward(grad.contiguous(), x, parameters, *places, ctx.tile, ctx.eps, ctx.depthwise, *saved)
    return *grads, *[None] * 8


_block.register_autograd(_backward, setup_context=_setup_context)
