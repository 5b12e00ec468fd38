"""General submanifold convolution on a GPU: rows gathered by a Triton kernel, products by the library.

    columns[o, k, :] = x[kernel_map[o, k], :]  (0 where that is -1)          out = columns @ weight.T

a chunk of output rows at a time, so that the columns stay small. The gradient of x is the same computation with the
map invert_kernel_map around: for every input row the output row that reads it through each tap, at most one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import aligned
from sparsecnx.geometry.kernel_map import invert_kernel_map
from sparsecnx.tensor import SparseTensor

COLUMN_VALUES = 2**28  # of a chunk of gathered rows


@triton.jit
def gather_columns_kernel(
    x_ptr,  # (rows, C)
    map_ptr,  # (rows out, TAPS) int32
    columns_ptr,  # (entries, C), entries = rows out * TAPS
    entries,
    C,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """columns = the rows of x that the entries of the map name, zeros for -1."""
    C = aligned(C, ALIGN)  # noqa: N806
    first = tl.program_id(0).to(tl.int64) * BLOCK_E
    entry = tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = entry < entries - first
    row = tl.load(map_ptr + first + entry, mask=known, other=-1)
    inside = (channel < C)[None, :]
    values = tl.load(
        x_ptr + row.to(tl.int64)[:, None] * C + channel[None, :], mask=(row >= 0)[:, None] & inside, other=0.0
    )
    tl.store(columns_ptr + first * C + (entry[:, None] * C + channel[None, :]), values, mask=known[:, None] & inside)


def gather_columns(x: Tensor, kernel_map: Tensor) -> Tensor:
    """Rows of `x (rows, C)` under each output row, `(rows out, taps * C)`."""
    (count, taps), channels = kernel_map.shape, x.shape[1]
    columns = x.new_empty(count, taps * channels)
    block_c = min(128, triton.next_power_of_2(channels))
    block_e = max(1, 4 * 128 * 16 // x.element_size() // block_c)  # four times 16 bytes for each of 128 threads
    grid = (triton_launch.blocks(count * taps, block_e), triton_launch.blocks(channels, block_c))
    triton_launch.launch(
        gather_columns_kernel,
        grid,
        x,
        kernel_map,
        columns,
        count * taps,
        channels,
        BLOCK_E=block_e,
        BLOCK_C=block_c,
        ALIGN=triton_launch.alignment(channels),
        num_warps=4,
    )
    return columns


def convolve(x: Tensor, weight: Tensor, kernel_map: Tensor) -> Tensor:
    """`(rows out, C_out)` of `x (rows, C_in)`, `weight (C_out, taps * C_in)` and `kernel_map (rows out, taps)`."""
    out = x.new_empty(kernel_map.shape[0], weight.shape[0])
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), out.split(size), strict=True):
        torch.mm(gather_columns(x, part), weight.t(), out=rows)
    return out


def weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> Tensor:
    """Gradient of the weight, `(C_out, taps * C_in)`, from `grad (rows out, C_out)`."""
    total = torch.zeros(grad.shape[1], kernel_map.shape[1] * x.shape[1], dtype=torch.float32, device=x.device)
    size = _chunk(kernel_map, x)
    for part, rows in zip(kernel_map.split(size), grad.split(size), strict=True):
        total += torch.mm(rows.t(), gather_columns(x, part))
    return total.to(x.dtype)


def _chunk(kernel_map: Tensor, x: Tensor) -> int:
    """Output rows of a chunk."""
    return max(1, COLUMN_VALUES // max(1, kernel_map.shape[1] * x.shape[1]))


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Return features `(rows / stride**ndim, C_out)` of the convolution with `weight (C_out, C_in, *kernel)`."""
    kernel_map = x.layout.kernel_map(tuple(weight.shape[2:]), stride, padding)
    taps = weight.flatten(2).movedim(1, 2).reshape(weight.shape[0], -1)  # (C_out, taps * C_in)
    out = rows_conv(x.features.contiguous(), taps.contiguous(), kernel_map, None)
    return out if bias is None else out + bias.to(out.dtype)


@torch.library.custom_op("sparsecnx_triton::conv", mutates_args=())
def rows_conv(x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    """`convolve`, differentiable; the gradient of x turns the map around where `inverse_map` is not given."""
    return convolve(x, weight, kernel_map)


@torch.library.custom_op("sparsecnx_triton::conv_backward", mutates_args=())
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, needs_x: bool
) -> tuple[Tensor, Tensor]:
    grad_weight = weight_grad(grad, x, kernel_map)
    if not needs_x:
        return x.new_empty(0), grad_weight
    if inverse_map is None:
        inverse_map = invert_kernel_map(kernel_map, x.shape[0])
    outputs, taps = weight.shape[0], kernel_map.shape[1]
    back = weight.view(outputs, taps, -1).permute(2, 1, 0).reshape(-1, taps * outputs)  # (C_in, taps * C_out)
    grad_x = convolve(grad, back, inverse_map)
    return grad_x, grad_weight


@rows_conv.register_fake
def _(x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    return x.new_empty(kernel_map.shape[0], weight.shape[0])


@_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, kernel_map, inverse_map = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_weight = _conv_backward(grad.contiguous(), x, weight, kernel_map, inverse_map, needs_x)
    return grad_x if needs_x else None, grad_weight, None, None


rows_conv.register_autograd(_backward, setup_context=_setup_context)
