"""Convolution on an explicit kernel map on a GPU: rows gathered by a Triton kernel, products by the library.

    columns[o, k, :] = x[kernel_map[o, k], :]  (0 where that is -1)          out = columns @ weight.T

The work is done a chunk of output rows at a time, so that the columns stay small. The gradient of x is the same
computation with the inverse kernel map: for every input row the output row that reads it through each tap, at most one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, load, row_block, store
from sparsecnx.backends.triton_launch import blocks, launch, row_sizes
from sparsecnx.geometry.kernel_map import MappedRows, check_inverse_map, invert_kernel_map
from sparsecnx.ops import flops

COLUMN_VALUES = 2**28  # of a chunk of gathered rows


@triton.jit
def gather_columns_kernel(
    x,  # (ROWS_IN, C)
    kernel_map,  # (ROWS,) int32: the entries (rows out, taps) of a kernel map
    columns,  # (ROWS, C)
    ROWS,
    ROWS_IN,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """columns = x[kernel_map], 0 where that is -1, NaN where it is no row."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(tl.program_id(0), o_c, ROWS, C, BLOCK_R)
    b_read = tl.load(kernel_map + i_row + o_r, mask=m_r, other=-1).to(tl.int64)
    m_read = (b_read >= 0) & (b_read < ROWS_IN)
    b_x = load(x + b_read[:, None] * C + o_c[None, :], m_read[:, None] & (o_c < C)[None, :])
    b_x = tl.where((m_read | (b_read == -1))[:, None], b_x, float("nan"))
    store(columns + i_row * C + o_x, b_x, m_x)


def gather_columns(x: Tensor, kernel_map: Tensor) -> Tensor:
    """Return the rows of `x (rows, C)` under each output row, `(rows out, taps * C)`."""
    (count, taps), channels = kernel_map.shape, x.shape[1]
    columns = x.new_empty(count, taps * channels)
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = max(1, 4 * 128 * 16 // x.element_size() // block_c)  # four times 16 bytes for each of 128 threads
    grid = (blocks(count * taps, block_r), blocks(channels, block_c))
    sizes = row_sizes(count * taps, channels, block_r, block_c)
    launch(
        gather_columns_kernel,
        grid,
        x=x,
        kernel_map=kernel_map,
        columns=columns,
        ROWS_IN=x.shape[0],
        **sizes,
        num_warps=4,
    )
    return columns


def convolve(x: Tensor, weight: Tensor, kernel_map: Tensor) -> Tensor:
    """Return `(rows out, C_out)` of `x (rows, C_in)`, `weight (C_out, taps * C_in)`, `kernel_map (rows out, taps)`."""
    out = x.new_empty(kernel_map.shape[0], weight.shape[0])
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), out.split(size), strict=True):
        torch.mm(gather_columns(x, part), weight.t(), out=rows)
    return out


def weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> Tensor:
    """Return the gradient of the weight, `(C_out, taps * C_in)`, from `grad (rows out, C_out)`."""
    total = torch.zeros(grad.shape[1], kernel_map.shape[1] * x.shape[1], dtype=torch.float32, device=x.device)
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), grad.split(size), strict=True):
        total += torch.mm(rows.t(), gather_columns(x, part))
    return total.to(x.dtype)


def _chunk(kernel_map: Tensor, x: Tensor) -> int:
    """Return the output rows of a chunk."""
    return max(1, COLUMN_VALUES // max(1, kernel_map.shape[1] * x.shape[1]))


def convolve_groups(
    features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (groups, K, C_in / groups, C_out / groups)`."""
    inverse_map = None if inverse_map is None else inverse_map.contiguous()
    parts = [
        torch.ops.sparsecnx_triton.conv(
            part.contiguous(),
            taps.permute(2, 0, 1).reshape(taps.shape[2], -1).contiguous(),
            kernel_map.contiguous(),
            inverse_map,
        )
        for part, taps in zip(features.chunk(weight.shape[0], 1), weight, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out + bias.to(out.dtype)


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    return convolve_groups(x.features, weight[None], bias, x.kernel_map, x.inverse_map)


def _conv(x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    """Return `convolve`. The gradient of x inverts the map where `inverse_map` is not given."""
    return convolve(x, weight, kernel_map)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, needs_x: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, without rows unless it is needed, and of the weight."""
    grad_weight = weight_grad(grad, x, kernel_map)
    if not needs_x:
        return x.new_empty(0, x.shape[1]), grad_weight
    if inverse_map is None:
        inverse_map = invert_kernel_map(kernel_map, x.shape[0])
    else:
        check_inverse_map(kernel_map, inverse_map)
    outputs, taps = weight.shape[0], kernel_map.shape[1]
    back = weight.view(outputs, taps, -1).permute(2, 1, 0).reshape(-1, taps * outputs)  # (C_in, taps * C_out)
    return convolve(grad, back, inverse_map), grad_weight


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grad_x, grad_weight = torch.ops.sparsecnx_triton.conv_backward(
        grad, saved.x, saved.weight, saved.kernel_map, saved.inverse_map, "x" in saved.needs
    )
    return {"x": grad_x, "weight": grad_weight}


register(
    "sparsecnx_triton::conv",
    sizes={"x": "rows C", "kernel_map": "rows_out K", "weight": "C_out K*C"},
    function=_conv,
    fake=lambda x, weight, kernel_map, inverse_map: x.new_empty(kernel_map.shape[0], weight.shape[0]),
    saves=("x", "weight", "kernel_map", "inverse_map"),
    backward=_backward,
    flops=flops.conv,
)
register(
    "sparsecnx_triton::conv_backward",
    public="conv",
    flops=flops.conv_backward,
    function=_conv_backward,
    fake=lambda grad, x, weight, kernel_map, inverse_map, needs_x: (
        x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]),
        torch.empty_like(weight),
    ),
)
