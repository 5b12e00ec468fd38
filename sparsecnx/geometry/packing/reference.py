"""Gather and scatter in plain torch, in any number of dimensions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sparsecnx.geometry.nested_order import rows_to_tile, tile_to_rows


def gather_rows(x: Any) -> Tensor:
    """Return the rows `(layout.rows, C)` of the dense tensor `(B, C, *spatial)` of a `Packing`."""
    dense, layout = x
    ndim = layout.ndim
    split = [part for size, side in zip(layout.tiles.grid, layout.tile, strict=True) for part in (size, side)]
    cells = dense.reshape(dense.shape[0], dense.shape[1], *split)
    by_tile = cells.permute(0, *(2 + 2 * d for d in range(ndim)), *(3 + 2 * d for d in range(ndim)), 1)
    return tile_to_rows(by_tile[layout.tiles.positions()])


def scatter_rows(x: Any, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, *spatial)` of the rows of a `Packing`, `fill (C,)` elsewhere."""
    rows, layout = x
    tiles, ndim, channels = layout.tiles, layout.ndim, rows.shape[1]
    by_tile = rows_to_tile(rows, layout.tile).reshape(tiles.count, layout.sites_per_tile * channels)
    blank = fill.repeat(layout.sites_per_tile).expand(layout.batch * math.prod(tiles.grid), -1)
    full = blank.index_copy(0, tiles.index, by_tile)
    full = full.reshape(layout.batch, *tiles.grid, *layout.tile, channels)
    interleave = [axis for d in range(ndim) for axis in (1 + d, 1 + ndim + d)]
    full = full.permute(0, 1 + 2 * ndim, *interleave)
    return full.reshape(layout.batch, channels, *layout.shape)
