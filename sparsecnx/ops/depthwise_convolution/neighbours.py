"""The neighbouring tiles that a depthwise kernel reads."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.geometry.layout import Layout


def neighbour_table(layout: Layout, kernel: tuple[int, ...]) -> Tensor:
    """Return the tiles that a kernel of this size reaches from each tile, see `TileSet.neighbours`."""
    return layout.tiles.neighbours(max(-(-(size // 2) // side) for size, side in zip(kernel, layout.tile, strict=True)))
