"""The maximum and the sum of the rows under a kernel map in Triton.

A program takes some output rows and a block of channels and goes over the taps, as the depthwise convolution on kernel
maps does. Gradients gather through the inverse map: that of a sum is the same kernel, that of a maximum takes from each
output row that reads a row what the row has won there. An entry that is no row gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, row_block, store
from sparsecnx.backends.triton_launch import blocks, launch, row_sizes
from sparsecnx.geometry.kernel_map import MappedRows, check_inverse_map, invert_kernel_map
from sparsecnx.ops.mapped.cpu_pooling import winner_dtype
from sparsecnx.ops.mapped.triton_kernels import WARPS, load_mapped, map_blocks


@triton.jit
def max_pool_kernel(
    x,  # (ROWS_IN, C)
    kernel_map,  # (ROWS, K) int32
    out,  # (ROWS, C)
    winner,  # (ROWS, C) uint8, or int32
    ROWS,
    ROWS_IN,
    C,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out[o] = max over k of x[kernel_map[o, k]], 0 without any; winner[o] = the first k that has it. A NaN wins."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_winner = tl.full((BLOCK_R, BLOCK_C), -1, tl.int32)
    for i_k in range(0, K):
        p_map = kernel_map + i_row * K + o_r * K + i_k
        b_x = load_mapped(x, p_map, m_r, o_c, ROWS_IN, C)
        m_read = tl.load(p_map, mask=m_r, other=-1) != -1
        m_better = m_read[:, None] & ((b_winner < 0) | (b_x > b_out) | (b_x != b_x))
        b_out = tl.where(m_better, b_x, b_out)
        b_winner = tl.where(m_better, i_k, b_winner)
    store(out + i_row * C + o_x, b_out, m_x)
    tl.store(winner + i_row * C + o_x, b_winner.to(winner.dtype.element_ty), mask=m_x)


@triton.jit
def max_pool_backward_kernel(
    grad,  # (ROWS_OUT, C)
    winner,  # (ROWS_OUT, C) uint8, or int32
    inverse_map,  # (ROWS, K) int32
    grad_x,  # (ROWS, C)
    ROWS,
    ROWS_OUT,
    C,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_x[i] = sum over k of grad[o] where winner[o] = k, with o = inverse_map[i, k]."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_grad_x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_k in range(0, K):
        p_map = inverse_map + i_row * K + o_r * K + i_k
        b_grad = load_mapped(grad, p_map, m_r, o_c, ROWS_OUT, C)
        b_read = tl.load(p_map, mask=m_r, other=-1).to(tl.int64)
        m_read = ((b_read >= 0) & (b_read < ROWS_OUT))[:, None] & (o_c < C)[None, :]
        b_winner = tl.load(winner + b_read[:, None] * C + o_c[None, :], mask=m_read, other=0).to(tl.int32)
        # A tap that reads nothing gives 0, or NaN where its entry is no row.
        b_grad_x += tl.where((b_winner == i_k) | (m_read == 0), b_grad, 0.0)
    store(grad_x + i_row * C + o_x, b_grad_x, m_x)


@triton.jit
def sum_pool_kernel(
    x,  # (ROWS_IN, C)
    kernel_map,  # (ROWS, K) int32
    out,  # (ROWS, C)
    factor,
    ROWS,
    ROWS_IN,
    C,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out[o] = factor * sum over k of x[kernel_map[o, k]]."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_k in range(0, K):
        b_out += load_mapped(x, kernel_map + i_row * K + o_r * K + i_k, m_r, o_c, ROWS_IN, C)
    store(out + i_row * C + o_x, b_out * factor, m_x)


def _launch(kernel: object, rows: int, channels: int, block: Tensor, **arguments: object) -> None:
    """Launch one program for each block of output rows and channels, as large as the features `block` allow."""
    block_r, block_c = map_blocks(block)
    grid = blocks(rows, block_r), blocks(channels, block_c)
    launch(kernel, grid, **arguments, **row_sizes(rows, channels, block_r, block_c), num_warps=WARPS)


def _max_pool(x: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the maximum `(rows_out, C)`, and the first tap that has it."""
    (rows, taps), (rows_in, channels) = kernel_map.shape, x.shape
    out = x.new_empty(rows, channels)
    winner = torch.empty_like(out, dtype=winner_dtype(taps))
    tensors = {"x": x, "kernel_map": kernel_map, "out": out, "winner": winner}
    _launch(max_pool_kernel, rows, channels, x, **tensors, ROWS_IN=rows_in, K=taps)
    return out, winner


def _max_pool_backward(grad: Tensor, winner: Tensor, inverse_map: Tensor) -> Tensor:
    """Return the gradient of x, `(rows_in, C)`."""
    (rows, taps), (rows_out, channels) = inverse_map.shape, grad.shape
    grad_x = grad.new_empty(rows, channels)
    tensors = {"grad": grad, "winner": winner, "inverse_map": inverse_map, "grad_x": grad_x}
    _launch(max_pool_backward_kernel, rows, channels, grad, **tensors, ROWS_OUT=rows_out, K=taps)
    return grad_x


def _sum_pool(x: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, factor: float) -> Tensor:
    """Return the sum `(rows_out, C)` times a number."""
    (rows, taps), (rows_in, channels) = kernel_map.shape, x.shape
    out = x.new_empty(rows, channels)
    tensors = {"x": x, "kernel_map": kernel_map, "out": out}
    _launch(sum_pool_kernel, rows, channels, x, **tensors, factor=factor, ROWS_IN=rows_in, K=taps)
    return out


def mapped_max_pool(x: MappedRows) -> Tensor:
    """Return the maximum of the rows under each output row, `(rows_out, C)`, 0 without any input."""
    out, _ = torch.ops.sparsecnx_triton.max_pool(*_arguments(x))
    return out


def mapped_sum_pool(x: MappedRows, factor: float) -> Tensor:
    """Return the sum of the rows under each output row times a number, `(rows_out, C)`."""
    return torch.ops.sparsecnx_triton.sum_pool(*_arguments(x), factor)


def _arguments(x: MappedRows) -> tuple[Tensor, Tensor, Tensor | None]:
    inverse_map = None if x.inverse_map is None else x.inverse_map.contiguous()
    return x.features.contiguous(), x.kernel_map.contiguous(), inverse_map


def _inverse(saved: Saved) -> Tensor:
    """Return the inverse map, compared with the kernel map where it was given."""
    if saved.inverse_map is None:
        return invert_kernel_map(saved.kernel_map, saved.shapes["x"][0])
    check_inverse_map(saved.kernel_map, saved.inverse_map)
    inverse_map: Tensor = saved.inverse_map
    return inverse_map


def _of_max_pool(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": torch.ops.sparsecnx_triton.max_pool_backward(grad, *saved.outputs, _inverse(saved))}


def _of_sum_pool(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": torch.ops.sparsecnx_triton.sum_pool(grad, _inverse(saved), saved.kernel_map, saved.factor)}


SIZES = {"x": "rows C", "kernel_map": "rows_out K", "inverse_map": "rows K"}
register(
    "sparsecnx_triton::max_pool",
    sizes=SIZES,
    function=_max_pool,
    fake=lambda x, kernel_map, inverse_map: (
        x.new_empty(kernel_map.shape[0], x.shape[1]),
        x.new_empty(kernel_map.shape[0], x.shape[1], dtype=winner_dtype(kernel_map.shape[1])),
    ),
    saves=("kernel_map", "inverse_map"),
    backward=_of_max_pool,
)
register(
    "sparsecnx_triton::max_pool_backward",
    public="max_pool",
    function=_max_pool_backward,
    fake=lambda grad, winner, inverse_map: grad.new_empty(inverse_map.shape[0], grad.shape[1]),
)
register(
    "sparsecnx_triton::sum_pool",
    public="avg_pool",
    sizes=SIZES,
    function=_sum_pool,
    fake=lambda x, kernel_map, inverse_map, factor: x.new_empty(kernel_map.shape[0], x.shape[1]),
    saves=("kernel_map", "inverse_map", "factor"),
    backward=_of_sum_pool,
)
