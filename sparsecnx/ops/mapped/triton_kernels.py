"""Depthwise convolution on an explicit kernel map in Triton.

A program takes some output rows and a block of channels and goes over the taps: for each, it reads where its rows read
and gathers those rows of x, as many taps at once as keep loads in flight. What is missing is not loaded. An
entry that is no row gives NaN: nothing waits for a check of the map. The gradient of x is the same kernel on the
inverse map.

Weight gradient: a program goes over a range of output rows once for every few taps, whose sums it keeps in registers,
and leaves partial sums over its range; those are added up in a second stage, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, load, row_block, store, zero_blocks
from sparsecnx.backends.triton_launch import blocks, launch, processors, row_sizes
from sparsecnx.geometry.kernel_map import MappedRows, check_inverse_map, invert_kernel_map
from sparsecnx.ops import flops

WARPS = 4
CHANNEL_BLOCKS = (128, 64, 32)
MOST_TAPS = 8  # whose rows are gathered, or whose sums are held, at once
ROWS = 2  # of a thread: they share its part of the weight
REGISTERS = 168  # of a thread of the weight gradient: without this bound ptxas aims for 128 and spills one
ROWS_IN_L1 = 1024  # of a range of the weight gradient


@triton.jit
def mapped_depthwise_conv_kernel(
    x,  # (rows in, C)
    weight,  # (K, C)
    bias,  # (C,) float32, or None
    kernel_map,  # (ROWS, K) int32
    out,  # (ROWS, C)
    ROWS,
    ROWS_IN,
    C,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out[o] = sum over k of weight[k] x[kernel_map[o, k]], + bias."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        for j in tl.static_range(BLOCK_K):
            b_x = load_mapped(x, kernel_map + i_row * K + o_r * K + (i_k + j), m_r, o_c, ROWS_IN, C)
            b_weight = load(weight + (i_k + j) * C + o_c, o_c < C)
            b_out += b_x * b_weight[None, :]
    if bias is not None:
        b_out += load(bias + o_c, o_c < C)[None, :]
    store(out + i_row * C + o_x, b_out, m_x)


@triton.jit
def mapped_depthwise_conv_weight_grad_kernel(
    grad,  # (ROWS, C)
    x,  # (rows in, C)
    kernel_map,  # (ROWS, K) int32
    partial,  # (ranges, K + 1, C) float32: of the weight, then of the bias
    ROWS,
    ROWS_IN,
    C,
    blocks_per_program,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial[range, k] = sum over output rows of grad[o] x[kernel_map[o, k]]; partial[range, K] = sum of grad."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = tl.program_id(1) * blocks_per_program
    i_last = tl.minimum(i_first + blocks_per_program, tl.cdiv(ROWS, BLOCK_R))
    p_partial = partial + tl.program_id(1).to(tl.int64) * ((K + 1) * C) + o_c
    for i_k in range(0, K, BLOCK_K):
        b_sums = zero_blocks(BLOCK_K, BLOCK_R, BLOCK_C)
        b_total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i_block in range(i_first, i_last):
            i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
            b_grad = load(grad + i_row * C + o_x, m_x)
            b_total += b_grad
            b_updated = ()
            for j in tl.static_range(BLOCK_K):
                b_x = load_mapped(x, kernel_map + i_row * K + o_r * K + (i_k + j), m_r, o_c, ROWS_IN, C)
                b_updated = b_updated + (b_sums[j] + b_x * b_grad,)
            b_sums = b_updated
        for j in tl.static_range(BLOCK_K):
            store(p_partial + (i_k + j) * C, tl.sum(b_sums[j], axis=0), o_c < C)
        if i_k == 0:
            store(p_partial + K * C, tl.sum(b_total, axis=0), o_c < C)


@triton.jit
def load_mapped(x, p_map, m_r, o_c, ROWS_IN, C):
    """Return the rows of x (ROWS_IN, C) that a kernel map names, 0 where that is -1, NaN where it is no row."""
    b_read = tl.load(p_map, mask=m_r, other=-1).to(tl.int64)
    m_read = (b_read >= 0) & (b_read < ROWS_IN)
    b_x = load(x + b_read[:, None] * C + o_c[None, :], m_read[:, None] & (o_c < C)[None, :])
    return tl.where((m_read | (b_read == -1))[:, None], b_x, float("nan"))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor) -> Tensor:
    """Convolve `x (rows in, C)` to `(rows out, C)`.

    Args:
        weight: `(K, C)`.
        bias: float32 `(C,)`, or None.
        kernel_map: int32 `(rows out, K)`.
    """
    (rows, taps), channels = kernel_map.shape, x.shape[1]
    out = x.new_empty(rows, channels)
    block_r, block_c = map_blocks(x)
    block_r *= ROWS
    launch(
        mapped_depthwise_conv_kernel,
        (blocks(rows, block_r), blocks(channels, block_c)),
        x=x,
        weight=weight,
        bias=bias,
        kernel_map=kernel_map,
        out=out,
        K=taps,
        BLOCK_K=_taps(kernel_map),
        ROWS_IN=x.shape[0],
        **row_sizes(rows, channels, block_r, block_c),
        num_warps=WARPS,
    )
    return out


def weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight, `(K, C)` in the dtype of `x`, and of the bias, float32 `(C,)`."""
    (rows, taps), channels = kernel_map.shape, x.shape[1]
    block_r, block_c = map_blocks(x)
    wide = blocks(channels, block_c)
    # Ranges short enough for L1 and for enough programs, long enough for the partial sums to be few beside the rows.
    ranges = max(blocks(rows, ROWS_IN_L1), blocks(4 * processors(x.device), wide))
    ranges = max(1, min(ranges, rows // (4 * block_r)))
    blocks_per_program = max(1, blocks(blocks(rows, ranges), block_r))
    ranges = max(1, blocks(rows, blocks_per_program * block_r))
    partial = torch.empty(ranges, taps + 1, channels, dtype=torch.float32, device=x.device)
    launch(
        mapped_depthwise_conv_weight_grad_kernel,
        (wide, ranges),
        grad=grad,
        x=x,
        kernel_map=kernel_map,
        partial=partial,
        blocks_per_program=blocks_per_program,
        K=taps,
        BLOCK_K=_taps(kernel_map),
        ROWS_IN=x.shape[0],
        **row_sizes(rows, channels, block_r, block_c),
        num_warps=WARPS,
        **({} if torch.version.hip else {"maxnreg": REGISTERS}),
    )
    sums = partial.sum(0)
    return sums[:-1].to(x.dtype), sums[-1].clone()


def map_blocks(x: Tensor) -> tuple[int, int]:
    """Return the rows and channels of a program: of a row, a thread takes 16 bytes."""
    # The widest block that pads the channels least.
    block = min(CHANNEL_BLOCKS, key=lambda size: (blocks(x.shape[1], size) * size, -size))
    return WARPS * 32 * 16 // x.element_size() // block, block


def _taps(kernel_map: Tensor) -> int:
    """Return how many taps are taken at once."""
    return max((size for size in range(1, MOST_TAPS + 1) if kernel_map.shape[1] % size == 0), default=1)


def mapped_depthwise_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    bias = None if bias is None else bias.contiguous()
    features = x.features.contiguous()
    return torch.ops.sparsecnx_triton.mapped_depthwise_conv(features, weight.contiguous(), bias, *_maps(x))


def _maps(x: MappedRows) -> tuple[Tensor, Tensor | None]:
    return x.kernel_map.contiguous(), None if x.inverse_map is None else x.inverse_map.contiguous()


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    """Return `convolve`. The gradient of x inverts the map where `inverse_map` is not given."""
    return convolve(x, weight, bias, kernel_map)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    x, kernel_map, inverse_map = saved.x, saved.kernel_map, saved.inverse_map
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        # The adjoint reads the map the other way: every input row gathers from the output rows that read it.
        if inverse_map is None:
            inverse_map = invert_kernel_map(kernel_map, x.shape[0])
        else:
            check_inverse_map(kernel_map, inverse_map)
        grads["x"] = torch.ops.sparsecnx_triton.mapped_depthwise_conv(grad, saved.weight, None, inverse_map, kernel_map)
    if saved.needs & {"weight", "bias"}:
        grads["weight"], grads["bias"] = torch.ops.sparsecnx_triton.mapped_depthwise_conv_weight_grad(
            grad, x, kernel_map
        )
    return grads


register(
    "sparsecnx_triton::mapped_depthwise_conv",
    sizes={"x": "rows C", "kernel_map": "rows_out K", "weight": "K C", "bias": "C"},
    function=_conv,
    fake=lambda x, weight, bias, kernel_map, inverse_map: x.new_empty(kernel_map.shape[0], x.shape[1]),
    saves=("x", "weight", "kernel_map", "inverse_map"),
    backward=_backward,
    flops=flops.mapped_depthwise_conv,
)
register(
    "sparsecnx_triton::mapped_depthwise_conv_weight_grad",
    public="mapped_depthwise_conv",
    flops=flops.mapped_depthwise_conv_weight_grad,
    function=weight_grad,
    fake=lambda grad, x, kernel_map: (
        x.new_empty(kernel_map.shape[1], x.shape[1]),
        x.new_empty(x.shape[1], dtype=torch.float32),
    ),
)
