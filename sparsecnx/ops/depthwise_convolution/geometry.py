"""What a depthwise kernel needs to know of its surroundings."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.geometry.layout import Layout


def neighbour_table(layout: Layout, kernel: tuple[int, ...]) -> Tensor:
    """The tiles that a kernel of this size reaches from each tile, see `TileSet.neighbours`."""
    reach = max(size // 2 for size in kernel)
    return layout.tiles.neighbours(-(-reach // layout.tile))
