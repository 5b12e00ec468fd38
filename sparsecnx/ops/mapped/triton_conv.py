"""Convolution on an explicit kernel map on a GPU.

    out[o, group] = sum over taps k of x[kernel_map[o, k], group] @ weight[group, k]        (nothing where that is -1)

Rows are gathered by a Triton kernel and multiplied by the library, a batch of groups at a time, a chunk of output rows
at a time, so that the columns stay small:

    columns[group, o, k] = x[kernel_map[o, k], group]          out = columns @ weight

Groups of less than NARROW channels make products too small for that. For them a program takes some output rows and a
block of output channels, and every channel reads the inputs of its group one after another, which are in L1.

The gradient of x is the same computation with the inverse kernel map: for every input row the output row that reads it
through each tap, at most one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, load, row_block, store
from sparsecnx.backends.triton_launch import alignment, blocks, launch, processors
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.kernel_map import MappedRows, invert_kernel_map
from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops import flops

COLUMN_VALUES = 2**28  # of a chunk of gathered rows
NARROW = 16  # channels of a group, from which on it is a matrix product
WARPS = 4
ROWS_OF_A_RANGE = 1024  # of the weight gradient of narrow groups


@triton.jit
def gather_columns_kernel(
    x,  # (ROWS_IN, C)
    kernel_map,  # (ROWS,) int32: the entries (rows out, taps) of a kernel map
    columns,  # (C / WIDTH, ROWS, WIDTH)
    ROWS,
    ROWS_IN,
    C,
    WIDTH,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C and of WIDTH
):
    """columns[group] = x[kernel_map, group], 0 where that is -1, NaN where it is no row."""
    C = aligned(C, ALIGN)
    WIDTH = aligned(WIDTH, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, _, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_x = load_rows(x, kernel_map + i_row + o_r, m_r, o_c, o_c < C, ROWS_IN, C)
    o_group = (o_c // WIDTH).to(tl.int64) * ROWS * WIDTH + o_c % WIDTH
    store(columns + i_row * WIDTH + (o_r[:, None] * WIDTH + o_group[None, :]), b_x, m_x)


@triton.jit
def narrow_conv_kernel(
    x,  # (ROWS_IN, C_IN)
    weight,  # (K, WIDTH, C)
    bias,  # (C,) float32, or None
    kernel_map,  # (ROWS, K) int32
    out,  # (ROWS, C)
    ROWS,
    ROWS_IN,
    C_IN,
    C,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # input channels of a group
    WIDTH_OUT: tl.constexpr,  # output channels of a group
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[o, c] = sum over k and j of x[kernel_map[o, k], WIDTH * group(c) + j] weight[k, j, c], + bias."""
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_out, m_out = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_k in range(K):
        for j in tl.static_range(WIDTH):
            o_in = o_c // WIDTH_OUT * WIDTH + j
            b_x = load_rows(x, kernel_map + (i_row + o_r) * K + i_k, m_r, o_in, o_c < C, ROWS_IN, C_IN)
            b_out += b_x * load(weight + (i_k * WIDTH + j) * C + o_c, o_c < C)[None, :]
    if bias is not None:
        b_out += load(bias + o_c, o_c < C)[None, :]
    store(out + i_row * C + o_out, b_out, m_out)


@triton.jit
def narrow_conv_weight_grad_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS_IN, C_IN)
    kernel_map,  # (ROWS, K) int32
    partial,  # (ranges, K, WIDTH, C) float32
    ROWS,
    ROWS_IN,
    C_IN,
    C,
    blocks_per_program,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # input channels of a group
    WIDTH_OUT: tl.constexpr,  # output channels of a group
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[range, k, j] = sum over output rows of grad[o, c] x[kernel_map[o, k], WIDTH * group(c) + j]."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = tl.program_id(2) * blocks_per_program
    i_last = tl.minimum(i_first + blocks_per_program, tl.cdiv(ROWS, BLOCK_R))
    i_k = tl.program_id(1) // WIDTH
    o_in = o_c // WIDTH_OUT * WIDTH + tl.program_id(1) % WIDTH
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_block in range(i_first, i_last):
        i_row, o_r, m_r, o_grad, m_grad = row_block(i_block, o_c, ROWS, C, BLOCK_R)
        b_x = load_rows(x, kernel_map + (i_row + o_r) * K + i_k, m_r, o_in, o_c < C, ROWS_IN, C_IN)
        b_sum += b_x * load(grad + i_row * C + o_grad, m_grad)
    p_partial = partial + (tl.program_id(2).to(tl.int64) * (K * WIDTH) + tl.program_id(1)) * C
    store(p_partial + o_c, tl.sum(b_sum, axis=0), o_c < C)


@triton.jit
def load_rows(x, p_map, m_r, o_c, m_c, ROWS_IN, C):
    """Return channels of the rows of x (ROWS_IN, C) that a kernel map names, 0 for -1, NaN where it is no row."""
    b_read = tl.load(p_map, mask=m_r, other=-1).to(tl.int64)
    m_read = (b_read >= 0) & (b_read < ROWS_IN)
    b_x = load(x + b_read[:, None] * C + o_c[None, :], m_read[:, None] & m_c[None, :])
    return tl.where((m_read | (b_read == -1))[:, None], b_x, float("nan"))


def gather_columns(x: Tensor, kernel_map: Tensor, groups: int) -> Tensor:
    """Return the rows of `x (rows, C)` under each output row, `(groups, rows out, taps * C / groups)`."""
    (count, taps), channels = kernel_map.shape, x.shape[1]
    width = channels // groups
    columns = x.new_empty(groups, count, taps * width)
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = max(1, 4 * 128 * 16 // x.element_size() // block_c)  # four times 16 bytes for each of 128 threads
    launch(
        gather_columns_kernel,
        (blocks(count * taps, block_r), blocks(channels, block_c)),
        x=x,
        kernel_map=kernel_map,
        columns=columns,
        ROWS=count * taps,
        ROWS_IN=x.shape[0],
        C=channels,
        WIDTH=width,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        ALIGN=alignment(channels, width),
        num_warps=WARPS,
    )
    return columns


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor) -> Tensor:
    """Return `(rows out, C_out)`; `weight (groups, taps, C_in / groups, C_out / groups)`, `bias (C_out,)` or None."""
    groups, taps, width, width_out = weight.shape
    out = x.new_empty(kernel_map.shape[0], groups * width_out)
    if _narrow(groups, width, width_out):
        block_r, block_c = _narrow_blocks(out.shape[1])
        launch(
            narrow_conv_kernel,
            (blocks(out.shape[0], block_r), blocks(out.shape[1], block_c)),
            x=x,
            weight=weight.permute(1, 2, 0, 3).contiguous(),
            bias=bias,
            kernel_map=kernel_map,
            out=out,
            ROWS=out.shape[0],
            **_narrow_sizes(x, weight.shape, block_r, block_c),
            num_warps=WARPS,
        )
        return out
    matrices = weight.reshape(groups, taps * width, width_out)
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), out.split(size), strict=True):
        columns = gather_columns(x, part, groups)
        if groups == 1:
            torch.mm(columns[0], matrices[0], out=rows)
        else:
            rows.unflatten(1, (groups, width_out)).copy_(torch.bmm(columns, matrices).movedim(0, 1))
    return out if bias is None else out.add_(bias)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, kernel_map: Tensor) -> Tensor:
    """Return the gradient of the weight, `(groups, C_out / groups, C_in / groups, taps)`."""
    groups, taps, width, width_out = weight.shape
    if _narrow(groups, width, width_out):
        block_r, block_c = _narrow_blocks(grad.shape[1])
        rows, wide = grad.shape[0], blocks(grad.shape[1], block_c)
        ranges = max(1, min(blocks(rows, ROWS_OF_A_RANGE), blocks(4 * processors(x.device), wide * taps * width)))
        blocks_per_program = max(1, blocks(blocks(rows, ranges), block_r))
        ranges = max(1, blocks(rows, blocks_per_program * block_r))
        partial = torch.empty(ranges, taps, width, grad.shape[1], dtype=torch.float32, device=x.device)
        launch(
            narrow_conv_weight_grad_kernel,
            (wide, taps * width, ranges),
            grad=grad,
            x=x,
            kernel_map=kernel_map,
            partial=partial,
            ROWS=rows,
            blocks_per_program=blocks_per_program,
            **_narrow_sizes(x, weight.shape, block_r, block_c),
            num_warps=WARPS,
        )
        sums = partial.sum(0).view(taps, width, groups, width_out)
        return sums.permute(2, 3, 1, 0).contiguous().to(x.dtype)
    total = torch.zeros(groups, taps * width, width_out, dtype=torch.float32, device=x.device)
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), grad.split(size), strict=True):
        columns = gather_columns(x, part, groups)
        total += torch.bmm(columns.mT, rows.unflatten(1, (groups, width_out)).movedim(1, 0))
    sums = total.view(groups, taps, width, width_out)
    return sums.permute(0, 3, 2, 1).contiguous().to(x.dtype)


def _chunk(kernel_map: Tensor, x: Tensor) -> int:
    """Return the output rows of a chunk."""
    return max(1, COLUMN_VALUES // max(1, kernel_map.shape[1] * x.shape[1]))


def _narrow(groups: int, width: int, width_out: int) -> bool:
    return groups > 1 and max(width, width_out) < NARROW


def _narrow_blocks(channels: int) -> tuple[int, int]:
    """Return the rows and channels of a program."""
    block_c = min(64, triton.next_power_of_2(channels))
    return max(1, 1024 // block_c), block_c


def _narrow_sizes(x: Tensor, weight: tuple[int, ...], block_r: int, block_c: int) -> dict[str, int]:
    groups, taps, width, width_out = weight
    return {
        "ROWS_IN": x.shape[0],
        "C_IN": x.shape[1],
        "C": groups * width_out,
        "K": taps,
        "WIDTH": width,
        "WIDTH_OUT": width_out,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }


def convolve(x: MappedRows | WindowRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (groups, K, C_in / groups, C_out / groups)`, `bias (C_out,)`.

    The inverse map is not used: comparing it costs as much as inverting the kernel map.
    """
    if bias is not None:
        bias = bias.to(statistics_dtype(x.dtype)).contiguous()
    return torch.ops.sparsecnx_triton.conv(x.features.contiguous(), weight, bias, x.kernel_map.contiguous())


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    return convolve(x, weight[None], bias)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        inverse_map = invert_kernel_map(saved.kernel_map, saved.shapes["x"][0])
        grads["x"] = torch.ops.sparsecnx_triton.conv(grad, saved.weight.mT, None, inverse_map)
    if "weight" in saved.needs:
        found = torch.ops.sparsecnx_triton.conv_weight_grad(grad, saved.x, saved.weight, saved.kernel_map)
        grads["weight"] = found.permute(0, 3, 2, 1)
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


register(
    "sparsecnx_triton::conv",
    sizes={"x": "rows C", "kernel_map": "rows_out K", "weight": "groups K width out", "bias": "groups*out"},
    function=convolve_rows,
    fake=lambda x, weight, bias, kernel_map: x.new_empty(kernel_map.shape[0], weight.shape[0] * weight.shape[3]),
    saves=("x", "weight", "bias", "kernel_map"),
    backward=_backward,
    flops=flops.conv,
)
register(
    "sparsecnx_triton::conv_weight_grad",
    public="conv",
    sizes={"grad": "rows_out C_out", "x": "rows C", "kernel_map": "rows_out K", "weight": "groups K width out"},
    function=weight_grad,
    fake=lambda grad, x, weight, kernel_map: weight.new_empty([weight.shape[axis] for axis in (0, 3, 2, 1)]),
    flops=flops.conv_weight_grad,
)
