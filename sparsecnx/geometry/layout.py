"""The geometry of the rows of a sparse tensor: visible tiles at one stride of a network, row order, kernel maps.

At any stride of the network a visible tile is a dense box of `tile` sites. So the geometry of every stage is the same
list of visible tiles, the `TileSet`, seen at another tile size, the `Layout`. Nothing here is tied to two dimensions.

Rows are ordered by image, then by visible tile in raster order, then by nested order inside the tile
(`sparsecnx.geometry.nested_order`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecnx.backends.transforms import transforms_active
from sparsecnx.geometry import tile_maps
from sparsecnx.geometry.mask_reading import read_mask, tile_of_sites
from sparsecnx.geometry.masks import format_shape
from sparsecnx.geometry.nested_order import tile_sites
from sparsecnx.geometry.tables import cached_table
from sparsecnx.geometry.tile_maps import Window
from sparsecnx.geometry.tiles import TileSet, opaque


@opaque
@dataclass(frozen=True, eq=False, init=False)
class Layout:
    """A `TileSet` at one stride of a network: the geometry of a `SparseTensor`'s rows.

    Attributes:
        tiles: the visible tiles. They keep the tables of all their layouts.
        tile: sites per tile along each axis ((8, 8), (4, 4), (2, 2), (1, 1) in the four stages of a ConvNeXt with
            32-pixel patches).
        stride: pixels of the original input per site along each axis.
        shape: spatial shape in sites, `(H, W)` in two dimensions.
        sites_per_tile: `prod(tile)`.
        rows: number of active sites in the batch.
    """

    tiles: TileSet
    tile: tuple[int, ...]
    stride: tuple[int, ...]
    shape: tuple[int, ...] = field(repr=False)
    sites_per_tile: int = field(repr=False)
    rows: int = field(repr=False)

    def __init__(self, tiles: TileSet, tile: int | tuple[int, ...], stride: int | tuple[int, ...] = 1) -> None:
        """See the attributes; a single number stands for the same along every axis."""
        grid, index = tiles.grid, tiles.index
        tile, stride = per_axis(tile, len(grid)), per_axis(stride, len(grid))
        # Functions such as torch.utils._pytree.tree_map put into the place of tensors what they like.
        count = index.numel() if isinstance(index, Tensor) else 0
        object.__setattr__(self, "tiles", tiles)
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "shape", tuple(cells * side for cells, side in zip(grid, tile, strict=True)))
        object.__setattr__(self, "sites_per_tile", math.prod(tile))
        object.__setattr__(self, "rows", count * self.sites_per_tile)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        shape: tuple[int, ...],
        visible: int | None = None,
        count: int | None = None,
        *,
        batch: int | None = None,
        ones: str = "masked",
        below_tile: str = "raise",
        name: str = "dense",
    ) -> Layout:
        """Lay out `batch` dense tensors with spatial `shape` under a mask, see `SparseTensor.from_dense`.

        The tile follows from the shapes: `shape / grid`. A mask of single sites is read, and cut into larger tiles
        where it consists of them, unless `visible` or `count` say that nothing is to be read.

        Args:
            batch: number of images; None for as many as the mask is for.
            name: what errors call the images.

        Raises:
            TypeError, ValueError: as `SparseTensor.from_dense`.
        """
        masked = read_mask(mask, shape, batch, ones, name)
        unread = torch.compiler.is_compiling() or transforms_active() or type(masked) is not Tensor
        if tuple(masked.shape[1:]) == shape and visible is None and count is None and not unread:
            tile = tile_of_sites(masked)
            corners = (slice(None), *(slice(None, None, side) for side in tile))
            masked = masked[corners]
        grid = tuple(masked.shape[1:])
        tile = tuple(size // cells for size, cells in zip(shape, grid, strict=True))
        return cls(TileSet.from_mask(masked, grid, visible, count, below_tile), tile)

    @property
    def batch(self) -> int:
        return self.tiles.batch

    @property
    def ndim(self) -> int:
        return len(self.tiles.grid)

    @property
    def device(self) -> torch.device:
        return self.tiles.index.device

    @property
    def side(self) -> int | None:
        """Return the side of a tile that is a square or cube, otherwise None."""
        return self.tile[0] if self.tile == self.tile[:1] * self.ndim else None

    @property
    def rows_per_image(self) -> int | None:
        """Return the active sites of every image, or None where images differ."""
        return None if self.tiles.visible is None else self.tiles.visible * self.sites_per_tile

    @property
    def row_splits(self) -> Tensor:
        """Return the first row of every image and the number of rows, int64 `(batch + 1,)`."""
        return cached_table(self.tiles, ("row_splits", self.tile), lambda: self.tiles.splits * self.sites_per_tile)

    def difference(self, other: Layout) -> str | None:
        """Return how the rows of two layouts differ, in words; None where both describe the same sites in one order.

        See `TileSet.difference`.
        """
        if other is self:
            return None
        different = self.tiles.difference(other.tiles)
        if different is None and other.tile != self.tile:
            return f"one has {format_shape(self.tile)} sites per tile, the other {format_shape(other.tile)}"
        return different

    def coarsen(self, stride: int | tuple[int, ...]) -> Layout:
        """Return the layout after a convolution with that stride, along each axis.

        Raises:
            ValueError: `stride` does not divide the tile.
        """
        steps = per_axis(stride, self.ndim)
        if len(steps) != self.ndim or any(step < 1 or side % step for side, step in zip(self.tile, steps, strict=True)):
            side = f"side, {self.side}" if self.side is not None else f"of {format_shape(self.tile)}"
            raise ValueError(
                f"stride is {stride}: it must divide the tile {side} sites; take larger patches, or in a network "
                'SparseTensor.from_dense(..., below_tile="dense"), which goes on without a mask from there'
            )
        if max(steps) == 1:
            return self
        return Layout(
            self.tiles,
            tuple(side // step for side, step in zip(self.tile, steps, strict=True)),
            tuple(before * step for before, step in zip(self.stride, steps, strict=True)),
        )

    def refine(self, factor: int | tuple[int, ...]) -> Layout:
        """Return the layout whose sites are smaller by `factor` along each axis: undoes `coarsen`.

        Where `factor` does not divide the stride, the sites are smaller than the pixels of the input; the stride is
        then 1.

        Raises:
            ValueError: `factor` is not positive.
        """
        steps = per_axis(factor, self.ndim)
        if len(steps) != self.ndim or min(steps) < 1:
            raise ValueError(f"factor is {factor}: expected a positive number, or one for each of {self.ndim} axes")
        return Layout(
            self.tiles,
            tuple(side * step for side, step in zip(self.tile, steps, strict=True)),
            tuple(1 if before % step else before // step for before, step in zip(self.stride, steps, strict=True)),
        )

    def coordinates(self) -> Tensor:
        """Return int32 `(rows, 1 + ndim)`: image, then position in multiples of `stride`, (n, y, x) in 2-D."""
        image, *corner = self.tiles.positions()
        sites = tile_sites(self.tile, self.device).unbind(dim=1)
        axes = [image[:, None].expand(-1, self.sites_per_tile)]
        for place, site, side, step in zip(corner, sites, self.tile, self.stride, strict=True):
            axes.append((place[:, None] * side + site) * step)
        return torch.stack(axes, dim=-1).flatten(0, 1).to(torch.int32)

    def row_image(self) -> Tensor:
        """Return the image that each row belongs to, int32 `(rows,)`."""

        def build() -> Tensor:
            image = self.tiles.positions()[0].to(torch.int32)
            # flatten() alone gives stride 0 where there is one tile, and kernels read the table in order.
            return image[:, None].expand(-1, self.sites_per_tile).flatten().contiguous()

        return cached_table(self.tiles, ("row_image", self.tile), build)

    def kernel_map(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        """Return the input row read by each output row of a convolution, int32 `(rows_out, prod(kernel))`.

        Output site `o` reads input site `o * stride - padding + k * dilation` for `k` in raster order over the kernel;
        -1 where that site is masked or outside. Every argument has one number for each axis; the output layout is
        `coarsen(stride)`. Built once per geometry.

        Raises:
            ValueError: `stride` does not divide the tile, or an argument does not fit the dimensions.
        """
        return self._map(tile_maps.kernel_map, Window(kernel, stride, padding, dilation))

    def inverse_map(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        """Return the output row that reads each input row through each tap, int32 `(rows_in, prod(kernel))`, else -1.

        It is the inverse of `kernel_map` with the same arguments, and raises the same errors.
        """
        return self._map(tile_maps.inverse_map, Window(kernel, stride, padding, dilation))

    def _map(self, build: Callable[[TileSet, tuple[int, ...], Window], Tensor], window: Window) -> Tensor:
        def checked() -> Tensor:
            for name, value in window._asdict().items():
                if len(value) != self.ndim:
                    raise ValueError(f"{name} is {value}: expected a number for each of {self.ndim} axes")
            self.coarsen(window.stride)
            return build(self.tiles, self.tile, window)

        return cached_table(self.tiles, (build.__name__, self.tile, window), checked)


def per_axis(value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Return one number for each axis; a single one stands for all of them."""
    return (value,) * ndim if isinstance(value, (int, torch.SymInt)) else tuple(value)
