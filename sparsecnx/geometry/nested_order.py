"""Nested row order inside a tile: the order of the rows of a sparse tensor.

A tile side is `odd * 2**k`. Nested order is raster over the `odd` coarsest cells and Morton (Z-) order below them, so
that the `2**ndim` children of a site are consecutive rows at every level.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nested_factors(tile: int) -> list[int]:
    """Return the branching of one tile side from coarse to fine: `[odd, 2, 2, ...]` with product `tile`."""
    factors = []
    while tile % 2 == 0:
        factors.append(2)
        tile //= 2
    return [tile, *factors]


def tile_to_rows(tiles: Tensor, ndim: int) -> Tensor:
    """Reorder dense tiles `(n, T, ..., T, C)` to rows in nested order, `(n * T**ndim, C)`."""
    count, tile, channels = tiles.shape[0], tiles.shape[1], tiles.shape[-1]
    factors = nested_factors(tile)
    levels = len(factors)
    split = tiles.reshape(count, *(factors * ndim), channels)
    coarse_to_fine = [1 + d * levels + level for level in range(levels) for d in range(ndim)]
    return split.permute(0, *coarse_to_fine, -1).reshape(count * tile**ndim, channels)


def rows_to_tile(rows: Tensor, tile: int, ndim: int) -> Tensor:
    """Reorder rows in nested order `(n * T**ndim, C)` to dense tiles `(n, T, ..., T, C)`; undoes `tile_to_rows`."""
    factors = nested_factors(tile)
    levels, sites, channels = len(factors), tile**ndim, rows.shape[-1]
    count = rows.shape[0] // sites
    split = rows.reshape(count, *(f for f in factors for _ in range(ndim)), channels)
    fine_by_axis = [1 + level * ndim + d for d in range(ndim) for level in range(levels)]
    return split.permute(0, *fine_by_axis, -1).reshape(count, *([tile] * ndim), channels)


def tile_sites(tile: int, ndim: int, device: torch.device | None = None) -> Tensor:
    """Return the coordinates of the sites of a tile in nested order, int64 `(T**ndim, ndim)`."""
    axes = [torch.arange(tile, device=device)] * ndim
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return tile_to_rows(grid[None], ndim)
