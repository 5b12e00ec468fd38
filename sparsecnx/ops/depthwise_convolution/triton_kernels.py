"""Submanifold depthwise convolution in Triton.

A program takes some columns of sites, POSITIONS of them side by side over successive tiles, STRIP sites high and
BLOCK_C channels deep, and keeps a float32 accumulator for each of the STRIP rows of sites in registers. A row of
input sites is loaded once for each horizontal tap and serves every output row that it reaches: 98 loads for the 392
products of a column under a 7x7 kernel at tile side 8. Where an input site lies follows from the table of
neighbouring tiles and the arithmetic of nested order.

Weight gradients: a program goes over a range of sites once for each column of taps, and leaves partial sums over it;
those are added up in a second stage, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import aligned, nested_column, nested_line, rounded
from sparsecnx.geometry.nested_order import nested_factors
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.tensor import SparseTensor

LONGEST_STRIP = 8  # output rows, and with them accumulators, of a program
SITES_IN_L1 = 1024  # of a range of the weight gradient; 128 KiB of x and its gradient at 32 channels in 16 bits
LARGEST_KERNEL = 63  # sites; the table of neighbours of a single site then has 63 * 63 entries
MOST_TAPS = 7  # rows of the kernel that are held in registers at once
WARPS = 4
CHANNEL_BLOCKS = (128, 64, 32)
# Registers a thread may use where ptxas, left alone, spills one to get by with fewer: by rows of sites of a program.
REGISTERS = {1: 96, 4: 168, 5: 255, 6: 255, 7: 255, 8: 255}


@triton.jit
def depthwise_conv_kernel(
    x_ptr,  # (rows, C)
    weight_ptr,  # (KERNEL_H * KERNEL_W, C)
    bias_ptr,  # (C,) float32
    residual_ptr,  # (rows, C)
    out_ptr,  # (rows, C)
    rstd_ptr,  # (rows,) float32
    table_ptr,  # (tiles, (2 * REACH + 1)**2) int32
    tiles,
    C,
    channels_per_program,
    eps,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """out = conv(x) + bias, + residual; with NORMALISE every row to zero mean and unit variance, rstd kept."""
    sites: tl.constexpr = TILE * TILE
    # Where the strip is the whole tile and all taps of a column are held, the rows that are read are known.
    whole: tl.constexpr = STRIP == TILE and TAPS == KERNEL_H
    C = aligned(C, ALIGN)  # noqa: N806
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    tile = position // TILE
    x0 = position % TILE
    known = tile < tiles
    strip = tl.program_id(1) * STRIP
    first_site = tile.to(tl.int64) * sites + nested_column(x0, TILE, LEVELS)
    first_channel = tl.program_id(2) * aligned(channels_per_program, ALIGN)
    last_channel = tl.minimum(first_channel + channels_per_program, C)
    neighbours = table_ptr + tile.to(tl.int64) * ((2 * REACH + 1) * (2 * REACH + 1))
    means = ()
    deviations = ()
    for _ in tl.static_range(STRIP):
        means = means + (tl.zeros((POSITIONS,), tl.float32),)
        deviations = deviations + (tl.zeros((POSITIONS,), tl.float32),)

    for c0 in range(first_channel, last_channel, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        inside = channel < C
        sums = ()
        for _ in tl.static_range(STRIP):
            sums = sums + (tl.zeros((POSITIONS, BLOCK_C), tl.float32),)
        for column_of_taps in range(0, (KERNEL_H // TAPS) * KERNEL_W):
            kx = column_of_taps % KERNEL_W
            ky0 = (column_of_taps // KERNEL_W) * TAPS
            step_x, site_column = _seek(x0 + kx - KERNEL_W // 2, TILE, REACH)
            in_line = nested_column(site_column, TILE, LEVELS)
            weights = ()
            for j in tl.static_range(TAPS):
                tap = (ky0 + j) * KERNEL_W + kx
                if FLIP:
                    tap = KERNEL_H * KERNEL_W - 1 - tap
                # Loaded by every thread in the layout it needs: threads of a column share the address.
                pointers = tl.broadcast_to((weight_ptr + tap * C + channel)[None, :], (POSITIONS, BLOCK_C))
                row = tl.load(pointers, mask=inside[None, :], other=0.0)
                weights = weights + (row.to(tl.float32),)
            starts = ()
            present = ()
            if whole:
                for step_y in tl.static_range(2 * REACH + 1):
                    start, there = _neighbour(neighbours, known, step_y, step_x, in_line, C, REACH, sites)
                    starts = starts + (start,)
                    present = present + (there,)
            for i in tl.static_range(STRIP + TAPS - 1):
                if whole:
                    start = starts[(i - KERNEL_H // 2 + TILE * REACH) // TILE]
                    there = present[(i - KERNEL_H // 2 + TILE * REACH) // TILE]
                    line = nested_line((i - KERNEL_H // 2 + TILE * REACH) % TILE, TILE, LEVELS)
                else:
                    step_y, y_inside = _seek(strip + i + ky0 - KERNEL_H // 2, TILE, REACH)
                    start, there = _neighbour(neighbours, known, step_y, step_x, in_line, C, REACH, sites)
                    line = nested_line(y_inside, TILE, LEVELS)
                pointers = x_ptr + (start + line * C)[:, None] + channel[None, :]
                values = tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
                updated = ()
                for s in tl.static_range(STRIP):
                    if i - s >= 0 and i - s < TAPS:
                        updated = updated + (sums[s] + values * weights[i - s],)
                    else:
                        updated = updated + (sums[s],)
                sums = updated

        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)[None, :]
        new_means = ()
        new_deviations = ()
        for s in tl.static_range(STRIP):
            out = sums[s]
            if HAS_BIAS:
                out = out + bias
            row = first_site + nested_line(strip + s, TILE, LEVELS)
            place = (row * C)[:, None] + channel[None, :]
            writable = known[:, None] & inside[None, :]
            if HAS_RESIDUAL:
                out += tl.load(residual_ptr + place, mask=writable, other=0.0).to(tl.float32)
            stored = rounded(out, out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, stored, mask=writable)
            if NORMALISE:
                # Moments of this block of channels, merged with those before (Chan, Golub, LeVeque 1979).
                values = stored.to(tl.float32)
                count = tl.minimum(BLOCK_C, C - c0).to(tl.float32)
                mean = tl.sum(tl.where(inside[None, :], values, 0.0), axis=1) / count
                centred = tl.where(inside[None, :], values - mean[:, None], 0.0)
                before = (c0 - first_channel).to(tl.float32)
                delta = mean - means[s]
                share = count / (before + count)
                new_means = new_means + (means[s] + delta * share,)
                squares = tl.sum(centred * centred, axis=1) + delta * delta * before * share
                new_deviations = new_deviations + (deviations[s] + squares,)
        if NORMALISE:
            means = new_means
            deviations = new_deviations

    if NORMALISE:
        # The rows just written are still in the cache: read them again, now that their moments are known.
        tl.debug_barrier()
        scales = ()
        for s in tl.static_range(STRIP):
            rstd = tl.rsqrt(deviations[s] / C + eps)
            row = first_site + nested_line(strip + s, TILE, LEVELS)
            tl.store(rstd_ptr + row, rstd, mask=known)
            scales = scales + (rstd,)
        for c0 in range(first_channel, last_channel, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            writable = known[:, None] & (channel < C)[None, :]
            for s in tl.static_range(STRIP):
                row = first_site + nested_line(strip + s, TILE, LEVELS)
                place = (row * C)[:, None] + channel[None, :]
                values = tl.load(out_ptr + place, mask=writable, other=0.0).to(tl.float32)
                out = (values - means[s][:, None]) * scales[s][:, None]
                tl.store(out_ptr + place, rounded(out, out_ptr.dtype.element_ty), mask=writable)


@triton.jit
def depthwise_conv_weight_grad_kernel(
    grad_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    partial_ptr,  # (ranges, KERNEL_H * KERNEL_W + 1, C) float32
    table_ptr,  # (tiles, (2 * REACH + 1)**2) int32
    tiles,
    C,
    positions_per_program,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums over a range of sites of grad * shifted x for every tap, and of grad."""
    C = aligned(C, ALIGN)  # noqa: N806
    sites: tl.constexpr = TILE * TILE
    whole: tl.constexpr = STRIP == TILE and TAPS == KERNEL_H
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    begin = tl.program_id(1) * positions_per_program
    end = tl.minimum(begin + positions_per_program, tiles * TILE)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (KERNEL_H * KERNEL_W + 1) * C + channel
    # The range is short enough to stay in L1 while one column of taps after the other goes over it.
    for column_of_taps in range(0, (KERNEL_H // TAPS) * KERNEL_W):
        kx = column_of_taps % KERNEL_W
        ky0 = (column_of_taps // KERNEL_W) * TAPS
        sums = ()
        for _ in tl.static_range(TAPS):
            sums = sums + (tl.zeros((POSITIONS, BLOCK_C), tl.float32),)
        total = tl.zeros((POSITIONS, BLOCK_C), tl.float32)

        for first in range(begin, end, POSITIONS):
            position = first + tl.arange(0, POSITIONS)
            known = position < end
            tile = position // TILE
            x0 = position % TILE
            first_site = tile.to(tl.int64) * sites + nested_column(x0, TILE, LEVELS)
            neighbours = table_ptr + tile.to(tl.int64) * ((2 * REACH + 1) * (2 * REACH + 1))
            step_x, site_column = _seek(x0 + kx - KERNEL_W // 2, TILE, REACH)
            in_line = nested_column(site_column, TILE, LEVELS)
            starts = ()
            present = ()
            if whole:
                for step_y in tl.static_range(2 * REACH + 1):
                    start, there = _neighbour(neighbours, known, step_y, step_x, in_line, C, REACH, sites)
                    starts = starts + (start,)
                    present = present + (there,)
            for strip in range(0, TILE, STRIP):
                grads = ()
                for s in tl.static_range(STRIP):
                    row = first_site + nested_line(strip + s, TILE, LEVELS)
                    pointers = grad_ptr + (row * C)[:, None] + channel[None, :]
                    grad = tl.load(pointers, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    grads = grads + (grad,)
                    if column_of_taps == 0:
                        total += grad
                for i in tl.static_range(STRIP + TAPS - 1):
                    if whole:
                        start = starts[(i - KERNEL_H // 2 + TILE * REACH) // TILE]
                        there = present[(i - KERNEL_H // 2 + TILE * REACH) // TILE]
                        line = nested_line((i - KERNEL_H // 2 + TILE * REACH) % TILE, TILE, LEVELS)
                    else:
                        step_y, y_inside = _seek(strip + i + ky0 - KERNEL_H // 2, TILE, REACH)
                        start, there = _neighbour(neighbours, known, step_y, step_x, in_line, C, REACH, sites)
                        line = nested_line(y_inside, TILE, LEVELS)
                    pointers = x_ptr + (start + line * C)[:, None] + channel[None, :]
                    values = tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    updated = ()
                    for j in tl.static_range(TAPS):
                        if i - j >= 0 and i - j < STRIP:
                            updated = updated + (sums[j] + values * grads[i - j],)
                        else:
                            updated = updated + (sums[j],)
                    sums = updated

        for j in tl.static_range(TAPS):
            tl.store(partial + ((ky0 + j) * KERNEL_W + kx) * C, tl.sum(sums[j], axis=0), mask=inside)
        if column_of_taps == 0:
            tl.store(partial + KERNEL_H * KERNEL_W * C, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _seek(coordinate, TILE: tl.constexpr, REACH: tl.constexpr):
    """A site's coordinate from the corner of its tile, -REACH * TILE or more: column of the table, place inside."""
    shifted = coordinate + TILE * REACH
    step = shifted // TILE
    return step, shifted - step * TILE


@triton.jit
def _neighbour(neighbours, known, step_y, step_x, in_line, C, REACH: tl.constexpr, SITES: tl.constexpr):
    """Offset of the features of line 0 in a neighbouring tile, int64, and whether the tile is visible."""
    there = tl.load(neighbours + (step_y * (2 * REACH + 1) + step_x), mask=known, other=-1)
    return (there.to(tl.int64) * SITES + in_line) * C, there >= 0


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    tile: int,
    *,
    residual: Tensor | None = None,
    flip: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution of rows.

    Args:
        x: `(rows, C)`.
        weight: `(C, 1, kh, kw)`.
        bias: float32 `(C,)` or None.
        table: of neighbouring tiles.
        tile: sites per tile side.
        residual: `(rows, C)`, added to the output.
        flip: with the kernel rotated by half a turn, as the gradient needs it.
        normalise: eps of a LayerNorm without scale and shift over the output, None for none.

    Returns:
        `(rows, C)`, and of the normalisation `1 / sqrt(variance + eps)`, float32 `(rows,)`, empty without it.
    """
    rows, channels = x.shape
    kernel = weight.shape[2], weight.shape[3]
    out = torch.empty_like(x)
    rstd = x.new_empty(rows if normalise is not None else 0, dtype=torch.float32)
    strip, height, block, positions = _blocks(x, tile, kernel)
    tiles = rows // tile**2
    per_program = channels if normalise is not None else block
    grid = (triton_launch.blocks(tiles * tile, positions), tile // strip, triton_launch.blocks(channels, per_program))
    triton_launch.launch(
        depthwise_conv_kernel,
        grid,
        x,
        _tap_rows(weight),
        bias,
        residual,
        out,
        rstd,
        table,
        tiles,
        channels,
        per_program,
        0.0 if normalise is None else normalise,
        TILE=tile,
        LEVELS=len(nested_factors(tile)) - 1,
        REACH=_reach(table),
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        STRIP=strip,
        TAPS=height,
        POSITIONS=positions,
        BLOCK_C=block,
        ALIGN=triton_launch.alignment(channels),
        FLIP=flip,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        NORMALISE=normalise is not None,
        num_warps=WARPS,
        **_registers(strip, normalise is not None or x.dtype == torch.float32),
    )
    return out, rstd


def weight_grad(grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, `(C, 1, kh, kw)` in the dtype of `x`, and of the bias, float32 `(C,)`, from `grad` and
    `x`, `(rows, C)`."""
    rows, channels = x.shape
    strip, height, block, positions = _blocks(x, tile, kernel)
    wide = triton_launch.blocks(channels, block)
    total = rows // tile  # of the positions of all tiles
    # Ranges short enough for L1 and for enough programs, long enough for the partial sums to be few beside the rows.
    ranges = max(
        triton_launch.blocks(rows, SITES_IN_L1), triton_launch.blocks(4 * triton_launch.processors(x.device), wide)
    )
    ranges = max(1, min(ranges, total // (4 * positions)))
    per_program = triton_launch.blocks(triton_launch.blocks(total, ranges), positions) * positions
    ranges = max(1, triton_launch.blocks(total, per_program)) if total else 1
    partial = torch.empty(ranges, kernel[0] * kernel[1] + 1, channels, dtype=torch.float32, device=x.device)
    triton_launch.launch(
        depthwise_conv_weight_grad_kernel,
        (wide, ranges),
        grad,
        x,
        partial,
        table,
        rows // tile**2,
        channels,
        per_program,
        TILE=tile,
        LEVELS=len(nested_factors(tile)) - 1,
        REACH=_reach(table),
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        STRIP=strip,
        TAPS=height,
        POSITIONS=positions,
        BLOCK_C=block,
        ALIGN=triton_launch.alignment(channels),
        num_warps=WARPS,
        **_registers(strip, x.dtype == torch.float32),
    )
    sums = partial.sum(0)
    return sums[:-1].t().to(x.dtype).contiguous().view(channels, 1, *kernel), sums[-1].clone()


def _tap_rows(weight: Tensor) -> Tensor:
    """Weight `(C, 1, kh, kw)` as the kernels read it: `(kh * kw, C)`, channels next to each other."""
    return weight.flatten(1).t().contiguous()


def check_kernel(weight: Tensor, name: str) -> None:
    """Raises ValueError where a kernel is larger than the kernels below go."""
    if max(weight.shape[2:]) > LARGEST_KERNEL:
        raise ValueError(f"{name} is {tuple(weight.shape)}: Triton kernels go to {LARGEST_KERNEL} sites a side")


def _blocks(x: Tensor, tile: int, kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows of sites and rows of taps of a program, its channels and its positions."""
    strip = max(size for size in range(1, LONGEST_STRIP + 1) if tile % size == 0)
    taps = max(size for size in range(1, MOST_TAPS + 1) if kernel[0] % size == 0)
    # The widest block that pads the channels least; a thread's part of a row is 16 bytes.
    block = min(CHANNEL_BLOCKS, key=lambda size: (triton_launch.blocks(x.shape[1], size) * size, -size))
    return strip, taps, block, WARPS * 32 * 16 // x.element_size() // block


def _registers(strip: int, tight: bool) -> dict[str, int]:
    """The launch option that names them, where it is needed."""
    return {"maxnreg": REGISTERS[strip]} if tight and strip in REGISTERS and torch.version.hip is None else {}


def _reach(table: Tensor) -> int:
    """Tiles to each side that a table of neighbours covers."""
    return (round(table.shape[1] ** 0.5) - 1) // 2


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows, C)` of the convolution of `x` with `weight (C, 1, kh, kw)`."""
    check_kernel(weight, "weight")
    table = neighbour_table(x.layout, weight.shape[2:])
    bias = None if bias is None else bias.contiguous()
    return _depthwise_conv(x.features.contiguous(), weight, bias, table, x.layout.tile)


@torch.library.custom_op("sparsecnx_triton::depthwise_conv", mutates_args=())
def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: int) -> Tensor:
    return convolve(x, weight, bias, table, tile)[0]


@torch.library.custom_op("sparsecnx_triton::depthwise_conv_weight_grad", mutates_args=())
def _depthwise_conv_weight_grad(
    grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel_h: int, kernel_w: int
) -> tuple[Tensor, Tensor]:
    return weight_grad(grad, x, table, tile, (kernel_h, kernel_w))


@_depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: int) -> Tensor:
    return torch.empty_like(x)


@_depthwise_conv_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, table: Tensor, tile: int, kernel_h: int, kernel_w: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1], 1, kernel_h, kernel_w)
    return x.new_empty(shape), x.new_empty(x.shape[1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, table, tile = inputs
    ctx.save_for_backward(x, weight, table)
    ctx.tile = tile
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, table = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        # Active sites neighbour each other symmetrically: the adjoint is the flipped kernel.
        grad_x = _depthwise_conv(grad, weight.flip(2, 3), None, table, ctx.tile)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _depthwise_conv_weight_grad(grad, x, table, ctx.tile, *weight.shape[2:])
    return grad_x, grad_weight, grad_bias if ctx.bias_dtype is not None else None, None, None


_depthwise_conv.register_autograd(_backward, setup_context=_setup_context)
