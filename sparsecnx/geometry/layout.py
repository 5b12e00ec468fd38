"""The geometry of the rows of a sparse tensor: visible tiles, row order, neighbour tables.

A mask is drawn on a coarse grid of *tiles* (patches). At any stride of the network a visible tile is a dense square
(cube) of `tile` sites per side. So the geometry of every stage is the same list of visible tiles, the `TileSet`, seen
at another tile size, the `Layout`. Nothing here is tied to two dimensions.

Rows are ordered by image, then by visible tile in raster order, then by nested order inside the tile
(`sparsecnx.geometry.nested_order`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsecnx.backends.registration import register
from sparsecnx.backends.transforms import transforms_active
from sparsecnx.geometry.masks import check_mask, format_shape, infer_grid
from sparsecnx.geometry.nested_order import tile_sites
from sparsecnx.geometry.tables import cached_table, capturing, current_stream, ordinary_tensors

T = TypeVar("T", bound=type)


def _opaque(cls: T) -> T:
    """Hide that `cls` is a dataclass.

    FSDP looks for tensors inside dataclasses and builds them anew: layers would no longer share their tables.
    """
    del cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls


@_opaque
@dataclass(frozen=True, eq=False)
class TileSet:
    """The visible tiles of a batch of images. All stages of a network share them.

    Attributes:
        batch: number of images.
        grid: tiles per axis, `(gh, gw)` in two dimensions.
        index: int64 `(tiles,)`, ascending: `image * prod(grid) + raster position` of each visible tile.
        splits: int64 `(batch + 1,)`; the visible tiles of image `n` are `index[splits[n]:splits[n + 1]]`.
        visible: number of visible tiles in every image, or None where images differ or may differ.
    """

    batch: int
    grid: tuple[int, ...]
    index: Tensor
    splits: Tensor
    visible: int | None
    tables: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    captured: bool = field(default_factory=capturing, repr=False)

    @classmethod
    def from_mask(
        cls, mask: Tensor, grid: tuple[int, ...], visible: int | None = None, count: int | None = None
    ) -> TileSet:
        """List the visible tiles of a mask as in MAE: bool `(B, prod(grid))` or `(B, *grid)`, True = masked (removed).

        With `visible`, every image is known to keep that many tiles, with `count` the whole batch: nothing is read
        back from the device and no shape depends on data. Without them the mask is counted, one synchronisation on
        a GPU.

        Raises:
            TypeError: `mask` is not a bool tensor.
            ValueError: its shape does not fit `grid`, or it does not keep `visible` or `count` tiles. On a GPU, and
                where torch.compile compiles, an assertion on the device fails instead. Or `torch.vmap` gives each
                sample another mask, and neither is known.
        """
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace would record this mask for all: use torch.export.export")
        flat = check_mask(mask, grid)
        batch, cells = flat.shape
        if torch.compiler.is_exporting() and visible is None and count is None:
            raise ValueError(
                "visible and count are None: torch.export needs one of them, since it cannot read the mask"
            )
        if visible is not None:
            if not 0 <= visible <= cells:
                raise ValueError(f"visible is {visible}: a grid of {cells} tiles keeps 0 to {cells}")
            if count not in (None, batch * visible):
                raise ValueError(f"count is {count}: {batch} images with visible={visible} keep {batch * visible}")
        elif count is not None and not 0 <= count <= batch * cells:
            raise ValueError(f"count is {count}: {batch} images of {cells} tiles keep 0 to {batch * cells}")

        known = visible is not None or count is not None
        if known and transforms_active():
            index, splits = torch.ops.sparsecnx_geometry.list_tiles(flat, visible, count)
            return cls(batch, grid, index, splits, visible)
        if known and (mask.device.type != "cpu" or torch.compiler.is_compiling()):
            return cls._without_reading(flat, grid, visible, count)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="the mask must be counted: pass visible= (tiles that each image keeps) or count="
            )
        counts = _count_tiles(flat) if batch else []
        _check_counts(counts, visible, count)
        if not known and len(set(counts)) < 2:
            visible = counts[0] if counts else 0
        if mask.device.type != "cpu":  # One synchronisation was enough.
            return cls._without_reading(flat, grid, visible, sum(counts))
        index = (~flat).flatten().nonzero().flatten()
        return cls(batch, grid, index, torch.tensor([0, *itertools.accumulate(counts)]), visible)

    @classmethod
    def _without_reading(cls, flat: Tensor, grid: tuple[int, ...], visible: int | None, count: int | None) -> TileSet:
        """List the visible tiles of a mask `(B, cells)` without reading it back to the host.

        A stable sort of the mask lists the visible tiles (False) first, in raster order.
        """
        batch, cells = flat.shape
        counts = (~flat).sum(dim=1)
        if visible is None:
            assert count is not None  # One of the two is known.
            torch._assert_async(counts.sum() == count, "mask does not keep count tiles in all")
            index = flat.flatten().to(torch.uint8).sort(stable=True).indices[:count]
            return cls(batch, grid, index, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), None)
        torch._assert_async((counts == visible).all(), "mask does not keep visible tiles in every image")
        kept = flat.to(torch.uint8).sort(dim=1, stable=True).indices[:, :visible]
        image = torch.arange(batch, device=flat.device)
        index = (image[:, None] * cells + kept).flatten()
        return cls(batch, grid, index, torch.arange(batch + 1, device=flat.device) * visible, visible)

    @classmethod
    def all_visible(cls, batch: int, grid: tuple[int, ...], device: torch.device) -> TileSet:
        """List every tile: the geometry of images of which nothing is masked.

        It is built once for each batch size, grid and device, and kept with its tables.
        """
        key = batch, grid, device, current_stream(device)
        keeps = not torch.compiler.is_compiling() and not capturing()
        found = _all_visible.get(key) if keeps else None
        if found is not None and type(torch.empty(0, device=device)) is Tensor:  # Otherwise fake tensors are asked for.
            return found
        cells = math.prod(grid)
        with ordinary_tensors():
            index = torch.arange(batch * cells, device=device)
            tiles = cls(batch, grid, index, torch.arange(batch + 1, device=device) * cells, cells)
        if keeps and type(index) is Tensor:
            for oldest in list(_all_visible)[: 1 - MOST_KEPT]:  # Another thread may do the same.
                _all_visible.pop(oldest, None)
            _all_visible[key] = tiles
        return tiles

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.grid)

    @property
    def count(self) -> int:
        """Number of visible tiles in the batch."""
        return self.index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.index.device

    def positions(self) -> tuple[Tensor, ...]:
        """Return image and grid coordinates of each visible tile: `ndim + 1` int64 tensors `(tiles,)`."""
        rest, coordinates = self.index, []
        for size in reversed(self.grid):
            coordinates.append(rest % size)
            rest = rest // size
        return (rest, *reversed(coordinates))

    def mask(self) -> Tensor:
        """Return the mask these tiles came from: bool `(B, prod(grid))`, True = masked."""
        flat = torch.ones(self.batch * math.prod(self.grid), dtype=torch.bool, device=self.device)
        return flat.index_fill(0, self.index, False).view(self.batch, math.prod(self.grid))

    def slots(self) -> Tensor:
        """Return the position in `index` of each tile, -1 where it is masked: int32 `(batch * prod(grid),)`."""
        return cached_table(self, "slots", lambda: self._number(self.index, self.batch * math.prod(self.grid)))

    def neighbours(self, radius: int) -> Tensor:
        """Return the neighbouring tiles of each tile, int32 `(tiles, (2 * radius + 1)**ndim)`, raster order of offsets.

        Entries are positions in `index`, -1 where the neighbour is masked or outside the image. The table is built once
        per radius and shared by all stages and layers.
        """
        return cached_table(self, radius, lambda: self._build_neighbours(radius))

    def _build_neighbours(self, radius: int) -> Tensor:
        # Number the tiles of a grid that is padded by `radius` on every side, so that no offset leaves its image.
        padded = [size + 2 * radius for size in self.grid]
        image, *place = self.positions()
        centre = image
        for coordinate, size in zip(place, padded, strict=True):
            centre = centre * size + coordinate + radius
        slots = self._number(centre, self.batch * math.prod(padded))
        # The offsets are computed on the device: a list of them would be copied there.
        shift = torch.zeros(1, dtype=torch.int64, device=self.device)
        steps = torch.arange(-radius, radius + 1, device=self.device)
        for size in padded:
            shift = (shift[:, None] * size + steps).flatten()
        return slots[centre[:, None] + shift]

    def _number(self, places: Tensor, count: int) -> Tensor:
        """Return int32 `(count,)`: the position of each visible tile at its place, int64 `(tiles,)`; -1 elsewhere."""
        blank = torch.full((count,), -1, dtype=torch.int32, device=self.device)
        return blank.index_copy(0, places, torch.arange(self.count, dtype=torch.int32, device=self.device))


def _count_tiles(flat: Tensor) -> list[int]:
    """Return the visible tiles of each image of a mask `(B, cells)`, read back to the host."""
    counts = (~flat).sum(dim=1)
    try:
        return counts.tolist()
    except RuntimeError as error:
        if not transforms_active():
            raise
        raise ValueError(
            "mask differs between the samples of torch.vmap, so that it cannot be counted: pass visible= (tiles that "
            "each image keeps) or count="
        ) from error


def _check_counts(counts: list[int], visible: int | None, count: int | None) -> None:
    if visible is not None and any(kept != visible for kept in counts):
        raise ValueError(f"mask does not keep visible={visible} tiles in every image")
    if count is not None and sum(counts) != count:
        raise ValueError(f"mask does not keep count={count} tiles in all")


def _list_tiles(mask: Tensor, visible: int | None, count: int | None) -> tuple[Tensor, Tensor]:
    """Return `index` and `splits` of a `TileSet`. `torch.vmap` calls an operator for each sample, with its own mask."""
    if mask.device.type == "cpu":
        _check_counts((~mask).sum(dim=1).tolist(), visible, count)
    tiles = TileSet._without_reading(mask, (mask.shape[1],), visible, count)
    return tiles.index, tiles.splits


def _fake_list_tiles(mask: Tensor, visible: int | None, count: int | None) -> tuple[Tensor, Tensor]:
    kept: Any = count if visible is None else mask.shape[0] * visible
    return mask.new_empty(kept, dtype=torch.int64), mask.new_empty(mask.shape[0] + 1, dtype=torch.int64)


register("sparsecnx_geometry::list_tiles", function=_list_tiles, fake=_fake_list_tiles)

MOST_KEPT = 8  # geometries of which nothing is masked
_all_visible: dict[Any, TileSet] = {}


@_opaque
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
        cls, mask: Tensor, shape: tuple[int, ...], visible: int | None = None, count: int | None = None
    ) -> Layout:
        """Lay out a dense tensor with spatial `shape` under `mask`, bool `(B, L)` or `(B, *grid)`.

        The tile side follows from the shapes: `shape / grid`, equal along all axes.

        Raises:
            TypeError, ValueError: as `TileSet.from_mask`, or no square tile fits.
        """
        grid, tile = infer_grid(mask, shape)
        return cls(TileSet.from_mask(mask, grid, visible, count), tile)

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

    def coarsen(self, stride: int | tuple[int, ...]) -> Layout:
        """Return the layout after a convolution with that stride, along each axis.

        Raises:
            ValueError: `stride` does not divide the tile.
        """
        steps = per_axis(stride, self.ndim)
        if len(steps) != self.ndim or any(step < 1 or side % step for side, step in zip(self.tile, steps, strict=True)):
            side = f"side, {self.side}" if self.side is not None else f"of {format_shape(self.tile)}"
            raise ValueError(f"stride is {stride}: it must divide the tile {side} sites")
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

    def kernel_map(self, kernel: tuple[int, ...], stride: int | tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """Return the input row read by each output row of a convolution, int32 `(rows_out, prod(kernel))`.

        Output site `o` reads input sites `o * stride - padding + k` for `k` in raster order over the kernel; -1 where
        that site is masked or outside. Built once per geometry.

        Raises:
            ValueError: `stride` does not divide the tile.
        """
        key = ("kernel_map", self.tile, kernel, stride, padding)
        return cached_table(self.tiles, key, lambda: self._build_kernel_map(kernel, stride, padding))

    def _build_kernel_map(
        self, kernel: tuple[int, ...], stride: int | tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        coarse, stride = self.coarsen(stride), per_axis(stride, self.ndim)
        sites = tile_sites(coarse.tile, self.device)
        # The offsets of the taps are computed on the device: a list of them would be copied there.
        axes = [torch.arange(-p, k - p, device=self.device) for k, p in zip(kernel, padding, strict=True)]
        taps = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        reach = max(
            max(math.ceil(p / side), (side - step - p + k - 1) // side)
            for side, step, k, p in zip(self.tile, stride, kernel, padding, strict=True)
        )
        width = 2 * reach + 1
        step_index = torch.zeros_like(sites[:, :1])
        raster = torch.zeros_like(step_index)
        for axis, (side, step) in enumerate(zip(self.tile, stride, strict=True)):
            # This is the position of the site that is read, relative to the corner of the output site's own tile.
            reads = sites[:, axis, None] * step + taps[None, :, axis]
            tile_step = reads.div(side, rounding_mode="floor")
            step_index = step_index * width + tile_step + reach
            raster = raster * side + reads - tile_step * side
        neighbour = self.tiles.neighbours(reach)[:, step_index]
        rows = neighbour * self.sites_per_tile + self._raster_to_nested()[raster].to(torch.int32)
        table = torch.where(neighbour >= 0, rows, -1)
        return table.flatten(0, 1)

    def _raster_to_nested(self) -> Tensor:
        """Return the nested index of each site of a tile in raster order, int64 `(prod(tile),)`."""
        raster = torch.zeros(self.sites_per_tile, dtype=torch.int64, device=self.device)
        for axis, side in enumerate(self.tile):
            raster = raster * side + tile_sites(self.tile, self.device)[:, axis]
        return raster.argsort()


def per_axis(value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Return one number for each axis; a single one stands for all of them."""
    return (value,) * ndim if isinstance(value, (int, torch.SymInt)) else tuple(value)
