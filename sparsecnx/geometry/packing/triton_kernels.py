"""Gather and scatter by Triton kernels. Each walks its output in the order of memory and writes every element once.

A block is read in the order of the dense tensor or of the rows and turned in registers and shared memory into that of
the other: planes are read and written along their sites, rows along their channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import nested_column, nested_line
from sparsecnx.geometry.nested_order import nested_factors

VALUES = 2048  # of a block: 16 for each thread of 4 warps
BLOCK_CHANNELS = 64  # 128 bytes of a row in 16 bits


@triton.jit
def collect_bits(value, LEVELS: tl.constexpr):
    """Bit 2b of a number moved to bit b, for b below LEVELS; its odd bits are dropped."""
    out = value & 0
    for bit in tl.static_range(LEVELS):
        out += ((value >> (2 * bit)) & 1) << bit
    return out


@triton.jit
def site_line(site, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """Row inside a tile of the site with that nested index; undoes `nested_line`."""
    odd: tl.constexpr = TILE >> LEVELS
    return ((site >> (2 * LEVELS)) // odd << LEVELS) + collect_bits(site >> 1, LEVELS)


@triton.jit
def site_column(site, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """Column inside a tile of the site with that nested index; undoes `nested_column`."""
    odd: tl.constexpr = TILE >> LEVELS
    return ((site >> (2 * LEVELS)) % odd << LEVELS) + collect_bits(site, LEVELS)


@triton.jit
def gather_kernel(
    dense_ptr,  # (B, C, H, W) of any strides
    index_ptr,  # int64 (tiles,): image * cells + cell of each visible tile
    rows_ptr,  # (rows, C), out
    rows,
    C,
    cells,  # tiles of an image, visible or not
    cells_x,  # of them side by side
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
    SITE_ALIGN: tl.constexpr,  # a divisor of the strides but that of channels
):
    channels = C // ALIGN * ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = tl.program_id(0) // tl.cdiv(channels, BLOCK_C) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    site = (row0 + r) % (TILE * TILE)
    place = tl.load(index_ptr + (row0 + r) // (TILE * TILE), known, 0).to(tl.int32)
    cell = place % cells
    y = cell // cells_x * TILE + site_line(site, TILE, LEVELS)
    x = cell % cells_x * TILE + site_column(site, TILE, LEVELS)
    at = (
        (place // cells).to(tl.int64) * (stride_n // SITE_ALIGN)
        + y.to(tl.int64) * (stride_y // SITE_ALIGN)
        + x.to(tl.int64) * (stride_x // SITE_ALIGN)
    ) * SITE_ALIGN
    inside = (c < channels)[:, None] & known[None, :]
    values = tl.load(dense_ptr + (c.to(tl.int64)[:, None] * stride_c + at[None, :]), inside)
    out = r[:, None] * channels + c[None, :]
    inside = known[:, None] & (c < channels)[None, :]
    tl.store(rows_ptr + row0.to(tl.int64) * channels + out, tl.trans(values), inside)


@triton.jit
def scatter_kernel(
    rows_ptr,  # (rows, C)
    fill_ptr,  # (C,)
    slots_ptr,  # int32 (B * cells,): position of each tile among the visible ones, -1 where masked
    dense_ptr,  # (B, C, H, W), contiguous, out
    C,
    plane,  # H * W
    width,  # W
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
    PLANE_ALIGN: tl.constexpr,  # a divisor of H * W
):
    channels = C // ALIGN * ALIGN
    sites = plane // PLANE_ALIGN * PLANE_ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    block = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    image = (block // tl.cdiv(sites, BLOCK_SITES)).to(tl.int64)
    site = block % tl.cdiv(sites, BLOCK_SITES) * BLOCK_SITES + tl.arange(0, BLOCK_SITES)
    known = site < sites
    y, x = site // width, site % width
    cell = y // TILE * (width // TILE) + x // TILE
    slot = tl.load(slots_ptr + image * (sites // (TILE * TILE)) + cell, known, -1)
    visible = slot >= 0
    row = slot.to(tl.int64) * (TILE * TILE) + (
        nested_line(y % TILE, TILE, LEVELS) + nested_column(x % TILE, TILE, LEVELS)
    )
    inside = (c < channels)[None, :]
    values = tl.load(rows_ptr + (row[:, None] * channels + c[None, :]), visible[:, None] & inside, 0.0)
    fill = tl.load(fill_ptr + c, c < channels, 0.0)
    values = tl.where(visible[:, None], values, fill[None, :])
    out = (image * channels + c.to(tl.int64))[:, None] * sites + site[None, :]
    tl.store(dense_ptr + out, tl.trans(values), (c < channels)[:, None] & known[None, :])


@triton.jit
def fill_grad_kernel(
    dense_ptr,  # (B, C, H, W) of any strides
    slots_ptr,  # int32 (B * cells,)
    sums_ptr,  # float32 (B, C), out: sum over the masked sites of each image
    C,
    plane,  # H * W
    width,  # W
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    TILE: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    total = tl.zeros((BLOCK_C, BLOCK_SITES), tl.float32)
    for site0 in range(0, plane, BLOCK_SITES):
        site = site0 + tl.arange(0, BLOCK_SITES)
        y, x = site // width, site % width
        cell = y // TILE * (width // TILE) + x // TILE
        slot = tl.load(slots_ptr + image * (plane // (TILE * TILE)) + cell, site < plane, 0)
        at = image * stride_n + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        inside = (c < C)[:, None] & (slot < 0)[None, :]
        total += tl.load(dense_ptr + (c.to(tl.int64)[:, None] * stride_c + at[None, :]), inside, 0.0).to(tl.float32)
    tl.store(sums_ptr + image * C + c, tl.sum(total, axis=1), c < C)


def gather_rows(x: Any) -> Tensor:
    """Return the rows `(layout.rows, C)` of the dense tensor `(B, C, H, W)` of a `Packing`."""
    dense, layout = x
    return gather_tiles(dense, layout.tiles.index, layout.tiles.slots(), layout.tile)


def scatter_rows(x: Any, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, H, W)` of the rows of a `Packing`, `fill (C,)` elsewhere."""
    rows, layout = x
    tiles = layout.tiles
    return scatter_tiles(
        rows.contiguous(), fill.contiguous(), tiles.index, tiles.slots(), layout.batch, *layout.shape, layout.tile
    )


@torch.library.custom_op("sparsecnx_triton::gather_tiles", mutates_args=())
def gather_tiles(dense: Tensor, index: Tensor, slots: Tensor, tile: int) -> Tensor:
    """Rows `(tiles * tile**2, C)` of the tiles of dense `(B, C, H, W)` that `index` and `slots` say are visible."""
    _, channels, height, width = dense.shape
    stride_n, stride_c, stride_y, stride_x = dense.stride()
    rows = index.shape[0] * tile**2
    out = dense.new_empty(rows, channels)
    block_c, block_rows = _block(channels)
    triton_launch.launch(
        gather_kernel,
        (triton_launch.blocks(rows, block_rows) * triton_launch.blocks(channels, block_c),),
        dense,
        index,
        out,
        rows,
        channels,
        height // tile * (width // tile),
        width // tile,
        stride_n,
        stride_c,
        stride_y,
        stride_x,
        TILE=tile,
        LEVELS=len(nested_factors(tile)) - 1,
        BLOCK_ROWS=block_rows,
        BLOCK_C=block_c,
        ALIGN=math.gcd(channels, 16),
        SITE_ALIGN=math.gcd(stride_n, stride_y, stride_x, 16),
    )
    return out


@torch.library.custom_op("sparsecnx_triton::scatter_tiles", mutates_args=())
def scatter_tiles(
    rows: Tensor, fill: Tensor, index: Tensor, slots: Tensor, batch: int, height: int, width: int, tile: int
) -> Tensor:
    """Dense `(B, C, H, W)` of the rows of the tiles that `index` and `slots` say are visible, `fill (C,)` elsewhere."""
    channels, plane = rows.shape[1], height * width
    dense = rows.new_empty(batch, channels, height, width)
    block_c, block_sites = _block(channels)
    block_sites = min(block_sites, triton.next_power_of_2(plane))
    triton_launch.launch(
        scatter_kernel,
        (batch * triton_launch.blocks(plane, block_sites) * triton_launch.blocks(channels, block_c),),
        rows,
        fill,
        slots,
        dense,
        channels,
        plane,
        width,
        TILE=tile,
        LEVELS=len(nested_factors(tile)) - 1,
        BLOCK_SITES=block_sites,
        BLOCK_C=block_c,
        ALIGN=math.gcd(channels, 16),
        PLANE_ALIGN=math.gcd(plane, 16),
    )
    return dense


@torch.library.custom_op("sparsecnx_triton::scatter_tiles_fill_grad", mutates_args=())
def scatter_fill_grad(dense: Tensor, slots: Tensor, tile: int) -> Tensor:
    """Sum of dense `(B, C, H, W)` over the sites that `slots` says are masked, `(C,)`."""
    batch, channels, height, width = dense.shape
    sums = torch.empty(batch, channels, dtype=torch.float32, device=dense.device)
    block_c = min(32, triton.next_power_of_2(channels))
    triton_launch.launch(
        fill_grad_kernel,
        (batch * triton_launch.blocks(channels, block_c),),
        dense,
        slots,
        sums,
        channels,
        height * width,
        width,
        *dense.stride(),
        TILE=tile,
        BLOCK_SITES=min(32, triton.next_power_of_2(height * width)),
        BLOCK_C=block_c,
    )
    return sums.sum(0).to(dense.dtype)


def _block(channels: int) -> tuple[int, int]:
    """Channels and sites of a block."""
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    return block_c, VALUES // block_c


@gather_tiles.register_fake
def _(dense: Tensor, index: Tensor, slots: Tensor, tile: int) -> Tensor:
    return dense.new_empty(index.shape[0] * tile**2, dense.shape[1])


@scatter_tiles.register_fake
def _(
    rows: Tensor, fill: Tensor, index: Tensor, slots: Tensor, batch: int, height: int, width: int, tile: int
) -> Tensor:
    return rows.new_empty(batch, rows.shape[1], height, width)


@scatter_fill_grad.register_fake
def _(dense: Tensor, slots: Tensor, tile: int) -> Tensor:
    return dense.new_empty(dense.shape[1])


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, index, slots, ctx.tile = inputs
    ctx.save_for_backward(index, slots)
    ctx.shape = dense.shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    batch, channels, height, width = ctx.shape
    fill = grad.new_zeros(channels)
    grad_dense = scatter_tiles(grad.contiguous(), fill, *ctx.saved_tensors, batch, height, width, ctx.tile)
    return grad_dense, None, None, None


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, index, slots, *_, ctx.tile = inputs
    ctx.save_for_backward(index, slots)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, slots = ctx.saved_tensors
    grad_rows = gather_tiles(grad, index, slots, ctx.tile) if ctx.needs_input_grad[0] else None
    grad_fill = scatter_fill_grad(grad, slots, ctx.tile) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_fill, None, None, None, None, None, None


gather_tiles.register_autograd(_gather_backward, setup_context=_gather_context)
scatter_tiles.register_autograd(_scatter_backward, setup_context=_scatter_context)
