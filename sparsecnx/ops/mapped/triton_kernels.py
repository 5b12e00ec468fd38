"""Depthwise convolution on an explicit kernel map in Triton.

A program takes some output rows and a block of channels and goes over the taps: for each, it reads where its rows read
and gathers those rows of x, as many taps at once as keep loads in flight. What is missing is not loaded. The gradient
of x is the same kernel on the inverse map.

Weight gradient: a program goes over a range of output rows once for every few taps, whose sums it keeps in registers,
and leaves partial sums over its range; those are added up in a second stage, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import aligned, rounded
from sparsecnx.geometry.kernel_map import MappedRows, invert_kernel_map
from sparsecnx.ops.convolution.triton_kernels import rows_conv

WARPS = 4
CHANNEL_BLOCKS = (128, 64, 32)
MOST_TAPS = 8  # whose rows are gathered, or whose sums are held, at once
ROWS = 2  # of a thread: they share its part of the weight
REGISTERS = 168  # of a thread of the weight gradient: ptxas, left alone, spills one to get by with 128
ROWS_IN_L1 = 1024  # of a range of the weight gradient


@triton.jit
def mapped_depthwise_conv_kernel(
    x_ptr,  # (rows in, C)
    weight_ptr,  # (K, C)
    bias_ptr,  # (C,) float32
    map_ptr,  # (rows out, K) int32
    out_ptr,  # (rows out, C)
    rows,
    C,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out[o] = sum over k of weight[k] * x[map[o, k]], + bias."""
    C = aligned(C, ALIGN)  # noqa: N806
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    known = row < rows
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k0 in range(0, K, TAPS):
        for j in tl.static_range(TAPS):
            read = tl.load(map_ptr + row * K + (k0 + j), mask=known, other=-1)
            values = tl.load(
                x_ptr + read.to(tl.int64)[:, None] * C + channel[None, :],
                mask=(read >= 0)[:, None] & inside[None, :],
                other=0.0,
            )
            weight = tl.load(weight_ptr + (k0 + j) * C + channel, mask=inside, other=0.0)
            total += values.to(tl.float32) * weight.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0)[None, :]
    out = rounded(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * C + channel[None, :], out, mask=known[:, None] & inside[None, :])


@triton.jit
def mapped_depthwise_conv_weight_grad_kernel(
    grad_ptr,  # (rows out, C)
    x_ptr,  # (rows in, C)
    map_ptr,  # (rows out, K) int32
    partial_ptr,  # (ranges, K + 1, C) float32: of the weight, then of the bias
    rows,
    rows_per_program,
    C,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """partial[range, k] = sum over output rows of grad[o] * x[map[o, k]]; partial[range, K] = sum of grad."""
    C = aligned(C, ALIGN)  # noqa: N806
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    steps = tl.cdiv(tl.minimum(rows_per_program, rows - first), BLOCK_R)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * ((K + 1) * C) + channel
    for k0 in range(0, K, TAPS):
        sums = ()
        for _ in tl.static_range(TAPS):
            sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for step in range(steps):
            row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
            known = row < rows
            grad = tl.load(
                grad_ptr + row[:, None] * C + channel[None, :], mask=known[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            total += grad
            updated = ()
            for j in tl.static_range(TAPS):
                read = tl.load(map_ptr + row * K + (k0 + j), mask=known, other=-1)
                values = tl.load(
                    x_ptr + read.to(tl.int64)[:, None] * C + channel[None, :],
                    mask=(read >= 0)[:, None] & inside[None, :],
                    other=0.0,
                )
                updated = updated + (sums[j] + values.to(tl.float32) * grad,)
            sums = updated
        for j in tl.static_range(TAPS):
            tl.store(partial + (k0 + j) * C, tl.sum(sums[j], axis=0), mask=inside)
        if k0 == 0:
            tl.store(partial + K * C, tl.sum(total, axis=0), mask=inside)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor) -> Tensor:
    """`(rows out, C)` of `x (rows in, C)`, `weight (K, C)`, `bias (C,)` float32 or None, `kernel_map (rows out, K)`."""
    rows, channels = kernel_map.shape[0], x.shape[1]
    out = x.new_empty(rows, channels)
    block_r, block_c = _blocks(x)
    block_r *= ROWS
    triton_launch.launch(
        mapped_depthwise_conv_kernel,
        (triton_launch.blocks(rows, block_r), triton_launch.blocks(channels, block_c)),
        x,
        weight,
        bias,
        kernel_map,
        out,
        rows,
        channels,
        K=kernel_map.shape[1],
        TAPS=_taps(kernel_map),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        ALIGN=triton_launch.alignment(channels),
        HAS_BIAS=bias is not None,
        num_warps=WARPS,
    )
    return out


def weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, `(K, C)` in the dtype of `x`, and of the bias, float32 `(C,)`."""
    (rows, taps), channels = kernel_map.shape, x.shape[1]
    block_r, block_c = _blocks(x)
    wide = triton_launch.blocks(channels, block_c)
    # Ranges short enough for L1 and for enough programs, long enough for the partial sums to be few beside the rows.
    ranges = max(
        triton_launch.blocks(rows, ROWS_IN_L1), triton_launch.blocks(4 * triton_launch.processors(x.device), wide)
    )
    ranges = max(1, min(ranges, rows // (4 * block_r)))
    per_program = max(1, triton_launch.blocks(triton_launch.blocks(rows, ranges), block_r)) * block_r
    ranges = max(1, triton_launch.blocks(rows, per_program))
    partial = torch.empty(ranges, taps + 1, channels, dtype=torch.float32, device=x.device)
    triton_launch.launch(
        mapped_depthwise_conv_weight_grad_kernel,
        (wide, ranges),
        grad,
        x,
        kernel_map,
        partial,
        rows,
        per_program,
        channels,
        K=taps,
        TAPS=_taps(kernel_map),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        ALIGN=triton_launch.alignment(channels),
        num_warps=WARPS,
        **({} if torch.version.hip else {"maxnreg": REGISTERS}),
    )
    sums = partial.sum(0)
    return sums[:-1].to(x.dtype), sums[-1].clone()


def _blocks(x: Tensor) -> tuple[int, int]:
    """Rows and channels of a program: of a row, a thread takes 16 bytes."""
    # The widest block that pads the channels least.
    block = min(CHANNEL_BLOCKS, key=lambda size: (triton_launch.blocks(x.shape[1], size) * size, -size))
    return WARPS * 32 * 16 // x.element_size() // block, block


def _taps(kernel_map: Tensor) -> int:
    """Taps taken at once."""
    return max((size for size in range(1, MOST_TAPS + 1) if kernel_map.shape[1] % size == 0), default=1)


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    taps = weight.permute(2, 0, 1).reshape(weight.shape[2], -1)  # (C_out, K * C_in)
    maps = (x.kernel_map.contiguous(), None if x.inverse_map is None else x.inverse_map.contiguous())
    out = rows_conv(x.features.contiguous(), taps.contiguous(), *maps)
    return out if bias is None else out + bias.to(out.dtype)


def mapped_depthwise_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    maps = (x.kernel_map.contiguous(), None if x.inverse_map is None else x.inverse_map.contiguous())
    bias = None if bias is None else bias.contiguous()
    return _mapped_depthwise_conv(x.features.contiguous(), weight.contiguous(), bias, *maps)


@torch.library.custom_op("sparsecnx_triton::mapped_depthwise_conv", mutates_args=())
def _mapped_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None
) -> Tensor:
    return convolve(x, weight, bias, kernel_map)


@torch.library.custom_op("sparsecnx_triton::mapped_depthwise_conv_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    return weight_grad(grad, x, kernel_map)


@_mapped_depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    return x.new_empty(kernel_map.shape[0], x.shape[1])


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(kernel_map.shape[1] + 1, x.shape[1], dtype=torch.float32)
    return sums[:-1].to(x.dtype), sums[-1].clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, kernel_map, inverse_map = inputs
    ctx.save_for_backward(x, weight, kernel_map, inverse_map)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, kernel_map, inverse_map = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        # The adjoint reads the map the other way: every input row gathers from the output rows that read it.
        inverse_map = invert_kernel_map(kernel_map, x.shape[0]) if inverse_map is None else inverse_map
        grad_x = _mapped_depthwise_conv(grad, weight, None, inverse_map, kernel_map)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _weight_grad(grad, x, kernel_map)
    return grad_x, grad_weight, grad_bias if ctx.bias_dtype is not None else None, None, None


_mapped_depthwise_conv.register_autograd(_backward, setup_context=_setup_context)
