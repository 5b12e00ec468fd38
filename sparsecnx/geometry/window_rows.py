"""Rows of tiles under the window of a convolution or pooling: a kernel map that is built only where it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsecnx.geometry import tile_maps
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.tile_maps import Window


@dataclass(frozen=True, eq=False)
class WindowRows:
    """The input of an operator on a kernel map, as `MappedRows`, where the map follows from the visible tiles.

    Compiled kernels for the CPU compute the entries that they need, and no map is kept.

    Attributes:
        features: `(rows_in, C)`.
        layout: the finer side: of the features, with `transposed` of the output.
        window: of the convolution from `layout` to `layout.coarsen(window.stride)`.
        transposed: whether the rows are read the other way, from the coarser side to the finer one.
    """

    features: Tensor
    layout: Layout
    window: Window
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def kernel_map(self) -> Tensor:
        """Return the map as a table, int32 `(rows_out, K)`."""
        return self._map(self.transposed)

    @property
    def inverse_map(self) -> Tensor | None:
        """Return the inverse of the map if the features may need a gradient, otherwise None."""
        needed = self.features.requires_grad and torch.is_grad_enabled()
        return self._map(not self.transposed) if needed else None

    @property
    def compiled_map(self) -> tuple[Tensor, list[int], list[int]]:
        """Return the map as the compiled operators take it: the index of the visible tiles, the grid and the window."""
        tiles = self.layout.tiles
        return tiles.index, *tile_maps.numbers(tiles, self.layout.tile, self.window, self.transposed)

    def to(self, dtype: torch.dtype) -> WindowRows:
        """Return the same rows with features of another dtype."""
        return replace(self, features=self.features.to(dtype))

    def _map(self, inverse: bool) -> Tensor:
        build = self.layout.inverse_map if inverse else self.layout.kernel_map
        return build(*self.window)
