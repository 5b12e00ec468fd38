"""Gather and scatter by Triton kernels. Each walks its output in the order of memory and writes every element once.

A block is read in the order of its source, the dense tensor or the rows, and transposed in registers and shared memory
to the order of the other. So planes are read and written along their sites, and rows along their channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import (
    aligned,
    channel_block,
    load,
    nested_part,
    place_of_site,
    row_block,
    volume,
)
from sparsecnx.backends.triton_launch import alignment, blocks, launch, row_sizes

VALUES = 2048  # of a block: 16 for each thread of 4 warps
BLOCK_CHANNELS = 64  # 128 bytes of a row in 16 bits


@triton.jit
def gather_kernel(
    dense,  # (B, C, D, H, W) of any strides
    index,  # (tiles,) int64: image * CELLS + cell of each visible tile
    rows,  # (ROWS, C)
    ROWS,
    C,
    CELLS,  # tiles of an image, visible or not
    CELLS_Y,  # of them on top of each other
    CELLS_X,  # and side by side
    stride_n,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    TILE: tl.constexpr,  # (z, y, x): sites of a tile along each axis
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
    SITE_ALIGN: tl.constexpr,  # a divisor of the strides but that of channels
):
    """rows[r, c] = dense[image, c, z, y, x], with (image, z, y, x) the site of row r."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)

    i_r = i_block * BLOCK_R + o_r
    i_site = i_r % volume(TILE)
    b_index = tl.load(index + i_r // volume(TILE), mask=m_r, other=0).to(tl.int32)
    i_cell = b_index % CELLS
    i_line = i_cell // CELLS_X
    i_z = i_line // CELLS_Y * TILE[0] + place_of_site(i_site, 0, TILE)
    i_y = i_line % CELLS_Y * TILE[1] + place_of_site(i_site, 1, TILE)
    i_x = i_cell % CELLS_X * TILE[2] + place_of_site(i_site, 2, TILE)
    o_site = (
        (b_index // CELLS).to(tl.int64) * (stride_n // SITE_ALIGN)
        + i_z.to(tl.int64) * (stride_z // SITE_ALIGN)
        + i_y.to(tl.int64) * (stride_y // SITE_ALIGN)
        + i_x.to(tl.int64) * (stride_x // SITE_ALIGN)
    ) * SITE_ALIGN
    o_dense = o_c.to(tl.int64)[:, None] * stride_c + o_site[None, :]
    b_x = tl.load(dense + o_dense, mask=(o_c < C)[:, None] & m_r[None, :])
    tl.store(rows + i_row * C + o_x, tl.trans(b_x), mask=m_x)


@triton.jit
def scatter_kernel(
    rows,  # (ROWS, C)
    fill,  # (C,)
    slots,  # (B * cells,) int32: position of each tile among the visible ones, -1 where masked
    dense,  # (B, C, D, H, W), contiguous
    C,
    SITES,  # D * H * W
    H,
    W,
    TILE: tl.constexpr,  # (z, y, x): sites of a tile along each axis
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
    SITE_ALIGN: tl.constexpr,  # a divisor of SITES
):
    """dense[image, c, z, y, x] = rows[r, c] where row r is that site, fill[c] where it is masked."""
    C = aligned(C, ALIGN)
    SITES = aligned(SITES, SITE_ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_image = (i_block // tl.cdiv(SITES, BLOCK_S)).to(tl.int64)
    i_site = i_block % tl.cdiv(SITES, BLOCK_S) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_site = i_site < SITES

    b_slot = load_slot(slots, i_image, i_site, m_site, SITES, H, W, TILE)
    i_line = i_site // W
    i_nested = (
        nested_part(i_line // H % TILE[0], 0, TILE)
        + nested_part(i_line % H % TILE[1], 1, TILE)
        + nested_part(i_site % W % TILE[2], 2, TILE)
    )
    i_row = b_slot.to(tl.int64) * volume(TILE) + i_nested
    m_row = (b_slot >= 0)[:, None]
    b_x = tl.load(rows + (i_row[:, None] * C + o_c[None, :]), mask=m_row & (o_c < C)[None, :], other=0.0)
    b_fill = tl.load(fill + o_c, mask=o_c < C, other=0.0)
    b_x = tl.where(m_row, b_x, b_fill[None, :])
    o_dense = (i_image * C + o_c.to(tl.int64))[:, None] * SITES + i_site[None, :]
    tl.store(dense + o_dense, tl.trans(b_x), mask=(o_c < C)[:, None] & m_site[None, :])


@triton.jit
def fill_grad_kernel(
    dense,  # (B, C, D, H, W) of any strides
    slots,  # (B * cells,) int32: position of each tile among the visible ones, -1 where masked
    sums,  # (B, C) float32
    C,
    SITES,  # D * H * W
    H,
    W,
    stride_n,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    TILE: tl.constexpr,  # (z, y, x): sites of a tile along each axis
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums = the sum of dense over the masked sites of each image."""
    i_image, o_c = channel_block(C, BLOCK_C)
    i_image = i_image.to(tl.int64)
    b_sum = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for i_first in range(0, SITES, BLOCK_S):
        i_site = i_first + tl.arange(0, BLOCK_S)
        m_site = i_site < SITES
        b_slot = load_slot(slots, i_image, i_site, m_site, SITES, H, W, TILE)
        i_line = i_site // W
        i_z, i_y, i_x = (i_line // H).to(tl.int64), (i_line % H).to(tl.int64), (i_site % W).to(tl.int64)
        o_site = i_image * stride_n + i_z * stride_z + i_y * stride_y + i_x * stride_x
        o_dense = o_c.to(tl.int64)[:, None] * stride_c + o_site[None, :]
        b_sum += load(dense + o_dense, (o_c < C)[:, None] & (m_site & (b_slot < 0))[None, :])
    tl.store(sums + i_image * C + o_c, tl.sum(b_sum, axis=1), mask=o_c < C)


@triton.jit
def load_slot(slots, i_image, i_site, m_site, SITES, H, W, TILE: tl.constexpr):
    """Return the position of the tiles of sites of an image among the visible ones, -1 where masked."""
    i_line = i_site // W
    i_cell = (i_line // H // TILE[0] * (H // TILE[1]) + i_line % H // TILE[1]) * (W // TILE[2]) + i_site % W // TILE[2]
    return tl.load(slots + i_image * (SITES // volume(TILE)) + i_cell, mask=m_site, other=-1)


def gather_rows(x: Any) -> Tensor:
    """Return the rows `(layout.rows, C)` of the dense tensor `(B, C, *spatial)` of a `Packing`."""
    tiles = x.layout.tiles
    return torch.ops.sparsecnx_triton.gather_tiles(x.features, tiles.index, tiles.slots(), x.layout.tile)


def scatter_rows(x: Any, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, *spatial)` of the rows of a `Packing`, `fill (C,)` elsewhere."""
    layout, tiles = x.layout, x.layout.tiles
    rows, fill = x.features.contiguous(), fill.contiguous()
    places = tiles.index, tiles.slots(), layout.batch, layout.shape, layout.tile
    return torch.ops.sparsecnx_triton.scatter_tiles(rows, fill, *places)


def _gather_tiles(dense: Tensor, index: Tensor, slots: Tensor, tile: Sequence[int]) -> Tensor:
    """Return the rows `(tiles * prod(tile), C)` of the visible tiles of dense `(B, C, *spatial)`."""
    channels, strides = dense.shape[1], _strides(dense)
    grid = [size // side for size, side in zip(dense.shape[2:], tile, strict=True)]
    _, cells_y, cells_x = _three(grid)
    count = index.shape[0] * math.prod(tile)
    rows = dense.new_empty(count, channels)
    block_c, block_r = _block(channels)
    launch(
        gather_kernel,
        (blocks(count, block_r) * blocks(channels, block_c),),
        dense=dense,
        index=index,
        rows=rows,
        CELLS=math.prod(grid),
        CELLS_Y=cells_y,
        CELLS_X=cells_x,
        **strides,
        TILE=_three(tile),
        SITE_ALIGN=alignment(*(stride for name, stride in strides.items() if name != "stride_c")),
        **row_sizes(count, channels, block_r, block_c),
    )
    return rows


def _scatter_tiles(
    rows: Tensor, fill: Tensor, index: Tensor, slots: Tensor, batch: int, shape: Sequence[int], tile: Sequence[int]
) -> Tensor:
    """Return dense `(B, C, *shape)` of the rows of the visible tiles, `fill (C,)` elsewhere."""
    channels, sites = rows.shape[1], math.prod(shape)
    dense = rows.new_empty(batch, channels, *shape)
    block_c, block_s = _block(channels)
    block_s = min(block_s, triton.next_power_of_2(sites))
    launch(
        scatter_kernel,
        (batch * blocks(sites, block_s) * blocks(channels, block_c),),
        rows=rows,
        fill=fill,
        slots=slots,
        dense=dense,
        C=channels,
        SITES=sites,
        H=_three(shape)[1],
        W=shape[-1],
        TILE=_three(tile),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        ALIGN=alignment(channels),
        SITE_ALIGN=alignment(sites),
    )
    return dense


def _fill_grad(dense: Tensor, slots: Tensor, tile: Sequence[int]) -> Tensor:
    """Return the sum of dense `(B, C, *spatial)` over the masked sites, `(C,)`."""
    batch, channels, *shape = dense.shape
    sums = torch.empty(batch, channels, dtype=torch.float32, device=dense.device)
    block_c = min(32, triton.next_power_of_2(channels))
    launch(
        fill_grad_kernel,
        (batch * blocks(channels, block_c),),
        dense=dense,
        slots=slots,
        sums=sums,
        C=channels,
        SITES=math.prod(shape),
        H=_three(shape)[1],
        W=shape[-1],
        **_strides(dense),
        TILE=_three(tile),
        BLOCK_S=min(16, triton.next_power_of_2(math.prod(shape))),  # With 32, registers spill on sm_80.
        BLOCK_C=block_c,
    )
    return sums.sum(0).to(dense.dtype)


def _three(sizes: Sequence[int], missing: int = 1) -> list[int]:
    """Return sizes along three axes: `missing` along the first ones of fewer."""
    return [missing] * (3 - len(sizes)) + list(sizes)


def _strides(dense: Tensor) -> dict[str, int]:
    image, channel, *space = dense.stride()
    names = ("stride_n", "stride_c", "stride_z", "stride_y", "stride_x")
    return dict(zip(names, (image, channel, *_three(space, missing=0)), strict=True))


def _block(channels: int) -> tuple[int, int]:
    """Return the channels and the sites of a block."""
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    return block_c, VALUES // block_c


def _gather_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    batch, channels, *shape = saved.shapes["dense"]
    places = saved.index, saved.slots, batch, shape, saved.tile
    return {"dense": torch.ops.sparsecnx_triton.scatter_tiles(grad, grad.new_zeros(channels), *places)}


def _scatter_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads: dict[str, Tensor | None] = {}
    if "rows" in saved.needs:
        grads["rows"] = torch.ops.sparsecnx_triton.gather_tiles(grad, saved.index, saved.slots, saved.tile)
    if "fill" in saved.needs:
        grads["fill"] = torch.ops.sparsecnx_triton.scatter_tiles_fill_grad(grad, saved.slots, saved.tile)
    return grads


register(
    "sparsecnx_triton::gather_tiles",
    public="SparseTensor.from_dense",
    function=_gather_tiles,
    fake=lambda dense, index, slots, tile: dense.new_empty(index.shape[0] * math.prod(tile), dense.shape[1]),
    saves=("index", "slots", "tile"),
    backward=_gather_backward,
)
register(
    "sparsecnx_triton::scatter_tiles",
    sizes={"rows": "rows C", "fill": "C"},
    public="SparseTensor.dense",
    function=_scatter_tiles,
    fake=lambda rows, fill, index, slots, batch, shape, tile: rows.new_empty(batch, rows.shape[1], *shape),
    saves=("index", "slots", "tile"),
    backward=_scatter_backward,
    strided=True,
)
register(
    "sparsecnx_triton::scatter_tiles_fill_grad",
    public="SparseTensor.dense",
    function=_fill_grad,
    fake=lambda dense, slots, tile: dense.new_empty(dense.shape[1]),
)
