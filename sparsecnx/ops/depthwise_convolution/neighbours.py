"""The neighbouring tiles that a depthwise kernel reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsecnx.geometry.layout import Layout


def neighbour_table(layout: Layout, kernel: Sequence[int]) -> Tensor:
    """Return the tiles that a kernel of this size reaches from each tile, see `TileSet.neighbours`."""
    return layout.tiles.neighbours(reach(layout.tile, kernel))


def reach(tile: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """Return how many tiles a kernel of this size reaches to either side along each axis."""
    return tuple(-(-(size // 2) // side) for size, side in zip(kernel, tile, strict=True))
