"""Kernel maps of convolutions on tiles: which row each tap reads, and which row reads it.

A tap takes a site of a tile to a site of a neighbouring tile, and where in that tile does not depend on the tile. So
both maps are sums of two small tables: the first row of each neighbour of each tile, and the place in it of what each
site and tap reach. `csrc/cpu/kernel_map.cpp` lists them on a CPU, where operators compute the entries as they read
them; torch does elsewhere, without waiting for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import register
from sparsecnx.geometry.nested_order import tile_sites
from sparsecnx.geometry.tiles import TileSet


class Window(NamedTuple):
    """Hold what a convolution reads, by axis: `o * stride - padding + k * dilation` for output site `o`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Reach(NamedTuple):
    """Hold what the sites of a tile and the taps reach along one axis.

    Attributes:
        position: int64 `(sites, taps)`, from the corner of the tile.
        low: its least value.
        high: its largest value.
    """

    position: Tensor
    low: int
    high: int


def numbers(
    tiles: TileSet, tile: tuple[int, ...], window: Window, inverse: bool = False
) -> tuple[list[int], list[int]]:
    """Return a grid and a window on its tiles as the compiled operators take them (csrc/cpu/mapped.h)."""
    return [tiles.batch, *tiles.grid], [int(inverse), *tile, *itertools.chain.from_iterable(window)]


def inverted(window: Sequence[int]) -> list[int]:
    """Return these numbers for the inverse map; none where there is no window."""
    return [1 - window[0], *window[1:]] if window else []


def rows_out(kernel_map: Tensor, window: Sequence[int]) -> int:
    """Return the rows of a kernel map in the form that the compiled operators take."""
    if not window:
        return kernel_map.shape[0]
    axes = len(window) // 5
    tile, stride = window[1 : 1 + axes], window[1 + 2 * axes : 1 + 3 * axes]
    return kernel_map.shape[0] * math.prod(tile if window[0] else _coarse(tile, stride))


def taps(kernel_map: Tensor, window: Sequence[int]) -> int:
    """Return the taps of a kernel map in the form that the compiled operators take."""
    axes = len(window) // 5
    return math.prod(window[1 + axes : 1 + 2 * axes]) if window else kernel_map.shape[1]


def kernel_map(tiles: TileSet, tile: tuple[int, ...], window: Window) -> Tensor:
    """Return the row of tiles of `tile` sites that each output row and tap read, int32 `(rows_out, prod(kernel))`."""
    if compiled.loaded and tiles.device.type == "cpu":
        return torch.ops.sparsecnx.kernel_map(tiles.index, *numbers(tiles, tile, window))
    coarse = _coarse(tile, window.stride)
    sites, taps = tile_sites(coarse, tiles.device), _taps(window.kernel, tiles.device)
    reaches = []
    for axis, (side, kernel, stride, padding, dilation) in enumerate(zip(coarse, *window, strict=True)):
        position = sites[:, axis, None] * stride - padding + taps[:, axis] * dilation
        reaches.append(Reach(position, -padding, (side - 1) * stride - padding + (kernel - 1) * dilation))
    return _rows_at(tiles, tile, reaches, None)


def inverse_map(tiles: TileSet, tile: tuple[int, ...], window: Window) -> Tensor:
    """Return the output row that reads each row through each tap, int32 `(rows_in, prod(kernel))`, else -1."""
    if compiled.loaded and tiles.device.type == "cpu":
        return torch.ops.sparsecnx.kernel_map(tiles.index, *numbers(tiles, tile, window, inverse=True))
    sites, taps = tile_sites(tile, tiles.device), _taps(window.kernel, tiles.device)
    reaches, read = [], torch.ones(sites.shape[0], taps.shape[0], dtype=torch.bool, device=tiles.device)
    for axis, (side, kernel, stride, padding, dilation) in enumerate(zip(tile, *window, strict=True)):
        strided = sites[:, axis, None] + padding - taps[:, axis] * dilation
        read = read & (strided % stride == 0)
        low, high = (padding - (kernel - 1) * dilation) // stride, (side - 1 + padding) // stride
        reaches.append(Reach(strided.div(stride, rounding_mode="floor"), low, high))
    return _rows_at(tiles, _coarse(tile, window.stride), reaches, read)


def _coarse(tile: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    return tuple(side // step for side, step in zip(tile, stride, strict=True))


def _taps(kernel: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the taps in raster order, int64 `(prod(kernel), ndim)`. They are computed on the device, not copied."""
    axes = [torch.arange(size, device=device) for size in kernel]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def _rows_at(tiles: TileSet, tile: tuple[int, ...], reaches: Sequence[Reach], exists: Tensor | None) -> Tensor:
    """Return the rows, in tiles of `tile` sites, that lie at these positions from every visible tile's corner.

    Args:
        reaches: the positions along each axis.
        exists: bool `(sites, taps)`, whether there is anything; None for everywhere.
    """
    # The tiles are numbered in a grid with a margin, so that no step leaves its image.
    before = [max(0, -(reach.low // side)) for reach, side in zip(reaches, tile, strict=True)]
    after = [max(0, reach.high // side) for reach, side in zip(reaches, tile, strict=True)]
    centre, slots = tiles.margin(before, after)
    steps = torch.zeros_like(reaches[0].position)
    raster = torch.zeros_like(steps)
    for (position, _, _), side, size, low, high in zip(reaches, tile, tiles.grid, before, after, strict=True):
        step = position.div(side, rounding_mode="floor")
        steps = steps * (size + low + high) + step
        raster = raster * side + position - step * side
    neighbour = slots[centre[:, None, None] + steps]
    rows = neighbour * math.prod(tile) + _nested(tile, tiles.device)[raster].to(torch.int32)
    visible = neighbour >= 0 if exists is None else (neighbour >= 0) & exists
    return rows.where(visible, -1).flatten(0, 1)


def _nested(tile: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the nested index of each site of a tile in raster order, int64 `(prod(tile),)`."""
    raster = torch.zeros(math.prod(tile), dtype=torch.int64, device=device)
    for side, place in zip(tile, tile_sites(tile, device).unbind(dim=1), strict=True):
        raster = raster * side + place
    return raster.argsort()


if compiled.loaded:
    register(
        "sparsecnx::kernel_map",
        public="Layout.kernel_map",
        fake=lambda index, grid, window: index.new_empty(
            rows_out(index, window), taps(index, window), dtype=torch.int32
        ),
    )
