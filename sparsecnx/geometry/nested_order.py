"""Nested row order inside a tile: the order of the rows of a sparse tensor.

Every level of the order, from the finest, halves all sides that are even, until no side is. Above the levels the odd
sides that are left are in raster order. So the children of a site, 2 along each halved axis, are consecutive rows:

    tile (4, 4)   (2, 2) inside (2, 2) inside (1, 1)     Morton (Z-) order
    tile (6, 12)  (2, 2) inside (1, 2) inside (3, 3)     the second level halves the longer side alone
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecnx.common.once import once


@once
def nested_levels(tile: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the branching of a tile along its axes, from coarse to fine; the product of all levels is the tile."""
    levels: list[tuple[int, ...]] = []
    while any(side % 2 == 0 for side in tile):
        levels.insert(0, tuple(1 + (side % 2 == 0) for side in tile))
        tile = tuple(side // branches for side, branches in zip(tile, levels[0], strict=True))
    return [tile, *levels]


@once
def children_are_consecutive(tile: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the sites under each output site of a stride are consecutive rows, in the order of such a tile.

    The output rows are in the order of the coarser tile, whose sides are `tile / stride`.
    """
    coarse = tuple(side // step for side, step in zip(tile, stride, strict=True))
    return _digits(nested_levels(tile)) == _digits(nested_levels(coarse) + nested_levels(stride))


def _digits(levels: list[tuple[int, ...]]) -> list[list[int]]:
    """Return `[axis, base]` of the digits of a row's number, from coarse to fine; two orders are equal if these are.

    Neighbouring digits of one axis are one digit.
    """
    digits: list[list[int]] = []
    for level in levels:
        for axis, base in enumerate(level):
            if digits and digits[-1][0] == axis:
                digits[-1][1] *= base
            elif base > 1:
                digits.append([axis, base])
    return digits


def tile_to_rows(tiles: Tensor) -> Tensor:
    """Reorder dense tiles `(n, *tile, C)` to rows in nested order, `(n * prod(tile), C)`."""
    count, *tile, channels = tiles.shape
    levels, ndim = nested_levels(tuple(tile)), len(tile)
    split = tiles.reshape(count, *(level[axis] for axis in range(ndim) for level in levels), channels)
    coarse_to_fine = [1 + axis * len(levels) + i for i in range(len(levels)) for axis in range(ndim)]
    return split.permute(0, *coarse_to_fine, -1).reshape(count * math.prod(tile), channels)


def rows_to_tile(rows: Tensor, tile: tuple[int, ...]) -> Tensor:
    """Reorder rows in nested order `(n * prod(tile), C)` to dense tiles `(n, *tile, C)`; undoes `tile_to_rows`."""
    levels, ndim = nested_levels(tile), len(tile)
    count, channels = rows.shape[0] // math.prod(tile), rows.shape[-1]
    split = rows.reshape(count, *(branches for level in levels for branches in level), channels)
    by_axis = [1 + i * ndim + axis for axis in range(ndim) for i in range(len(levels))]
    return split.permute(0, *by_axis, -1).reshape(count, *tile, channels)


def tile_sites(tile: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Return the coordinates of the sites of a tile in nested order, int64 `(prod(tile), ndim)`."""
    axes = [torch.arange(side, device=device) for side in tile]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return tile_to_rows(grid[None])
