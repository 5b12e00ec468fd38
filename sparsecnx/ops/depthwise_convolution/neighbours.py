"""The neighbouring tiles that a depthwise kernel reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsecnx.geometry.layout import Layout


def neighbour_table(layout: Layout, kernel: Sequence[int]) -> Tensor:
    """Return the tiles that a kernel of this size reaches from each tile, see `TileSet.neighbours`."""
    return layout.tiles.neighbours(_reach(layout, kernel))


def square_neighbour_table(layout: Layout, kernel: Sequence[int]) -> Tensor:
    """Return as many tiles along every axis as the kernel reaches along one, for kernels that know a single reach."""
    return layout.tiles.neighbours((max(_reach(layout, kernel)),) * layout.ndim)


def _reach(layout: Layout, kernel: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-(size // 2) // side) for size, side in zip(kernel, layout.tile, strict=True))
