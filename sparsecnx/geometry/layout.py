"""Where the rows of a sparse tensor lie: visible tiles, nested row order, neighbour tables.

A mask is drawn on a coarse grid of *tiles* (patches). At any stride of the network a visible tile is a
dense square (cube) of `tile` sites per side, so the geometry of every stage is the same list of visible
tiles, the `TileSet`, seen at another tile size, the `Layout`. Nothing here is tied to two dimensions.

Row order: by image, then by visible tile in raster order, then by *nested* order inside the tile. A tile
side is `odd * 2**k`; nested order is raster over the `odd` coarsest cells and Morton (Z-) order below
them, so that the `2**ndim` children of a site are consecutive rows at every level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled, cuda
from sparsecnx.backends.selection import selected
from sparsecnx.choices import compare


def nested_factors(tile: int) -> list[int]:
    """Branching of one tile side from coarse to fine: `[odd, 2, 2, ...]` with product `tile`."""
    factors = []
    while tile % 2 == 0:
        factors.append(2)
        tile //= 2
    return [tile, *factors]


def tile_to_rows(tiles: Tensor, ndim: int) -> Tensor:
    """Dense tiles `(n, T, ..., T, C)` to rows in nested order, `(n * T**ndim, C)`."""
    count, tile, channels = tiles.shape[0], tiles.shape[1], tiles.shape[-1]
    factors = nested_factors(tile)
    levels = len(factors)
    split = tiles.reshape(count, *(factors * ndim), channels)
    coarse_to_fine = [1 + d * levels + level for level in range(levels) for d in range(ndim)]
    return split.permute(0, *coarse_to_fine, -1).reshape(count * tile**ndim, channels)


def rows_to_tile(rows: Tensor, tile: int, ndim: int) -> Tensor:
    """Rows in nested order `(n * T**ndim, C)` to dense tiles `(n, T, ..., T, C)`; undoes `tile_to_rows`."""
    factors = nested_factors(tile)
    levels, sites, channels = len(factors), tile**ndim, rows.shape[-1]
    count = rows.shape[0] // sites
    split = rows.reshape(count, *(f for f in factors for _ in range(ndim)), channels)
    fine_by_axis = [1 + level * ndim + d for d in range(ndim) for level in range(levels)]
    return split.permute(0, *fine_by_axis, -1).reshape(count, *([tile] * ndim), channels)


def tile_sites(tile: int, ndim: int, device: torch.device | None = None) -> Tensor:
    """Coordinates of the sites of a tile in nested order, int64 `(T**ndim, ndim)`."""
    axes = [torch.arange(tile, device=device)] * ndim
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return tile_to_rows(grid[None], ndim)


@dataclass(frozen=True, eq=False)
class TileSet:
    """Which tiles of which image are visible. Shared by every stage of a network.

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
    _tables: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _captured: bool = field(default_factory=lambda: _capturing(), repr=False)

    @classmethod
    def from_mask(
        cls, mask: Tensor, grid: tuple[int, ...], visible: int | None = None, count: int | None = None
    ) -> TileSet:
        """From a mask as in MAE: bool `(B, prod(grid))` or `(B, *grid)`, True = masked (removed).

        With `visible`, every image is known to keep that many tiles, with `count` the whole batch: nothing is read
        back from the device and no shape depends on data. Without them the mask is counted, one synchronisation on
        a GPU.

        Raises:
            TypeError: `mask` is not a bool tensor.
            ValueError: its shape does not fit `grid`, or it does not keep `visible` or `count` tiles. On a GPU, and
                where torch.compile compiles, an assertion on the device fails instead.
        """
        flat = check_mask(mask, grid)
        batch, cells = flat.shape
        if visible is not None:
            if not 0 <= visible <= cells:
                raise ValueError(f"visible is {visible}: a grid of {cells} tiles keeps 0 to {cells}")
            if count not in (None, batch * visible):
                raise ValueError(f"count is {count}: {batch} images with visible={visible} keep {batch * visible}")
            count = batch * visible
            message = f"mask does not keep {_said('visible', visible)} tiles in every image"
        elif count is not None:
            if not 0 <= count <= batch * cells:
                raise ValueError(f"count is {count}: {batch} images of {cells} tiles keep 0 to {batch * cells}")
            message = f"mask does not keep {_said('count', count)} tiles in all"
        else:
            counts = (~flat).sum(dim=1)
            known = counts.tolist() if batch else [0]
            visible = known[0] if min(known) == max(known) else None
            if not _takes_cuda(mask.device, len(grid)):
                index = (~flat).flatten().nonzero().flatten()
                return cls(batch, grid, index, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), visible)
            count, message = sum(known), ""

        if _takes_cuda(mask.device, len(grid)):
            tile_index = torch.ops.sparsecnx_cuda.tile_index
            index, splits, slots = tile_index(flat.contiguous(), count, -1 if visible is None else visible)
            if message:
                _insist(splits[-1] == count, message)
            tiles = cls(batch, grid, index, splits, visible)
            if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
                remember(tiles, "slots", lambda: slots)
            return tiles

        # A stable sort of the mask lists the visible tiles (False) first, in raster order.
        counts = (~flat).sum(dim=1)
        if visible is None:
            _insist(counts.sum() == count, message)
            index = flat.flatten().to(torch.uint8).sort(stable=True).indices[:count]
            splits = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            return cls(batch, grid, index, splits, None)
        _insist((counts == visible).all(), message)
        kept = flat.to(torch.uint8).sort(dim=1, stable=True).indices[:, :visible]
        image = torch.arange(batch, device=mask.device)
        index = (image[:, None] * cells + kept).flatten()
        splits = torch.arange(batch + 1, device=mask.device) * visible
        return cls(batch, grid, index, splits, visible)

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
        """Image and grid coordinates of each visible tile: `ndim + 1` int64 tensors `(tiles,)`."""
        rest, coordinates = self.index, []
        for size in reversed(self.grid):
            coordinates.append(rest % size)
            rest = rest // size
        return (rest, *reversed(coordinates))

    def mask(self) -> Tensor:
        """The mask these tiles came from: bool `(B, prod(grid))`, True = masked."""
        flat = torch.ones(self.batch * math.prod(self.grid), dtype=torch.bool, device=self.device)
        return flat.index_fill(0, self.index, False).view(self.batch, math.prod(self.grid))

    def slots(self) -> Tensor:
        """int32 `(batch * prod(grid),)`: position in `index` of each tile, -1 where it is masked."""
        return remember(self, "slots", lambda: self._number(self.index, self.batch * math.prod(self.grid)))

    def neighbours(self, radius: int) -> Tensor:
        """Neighbouring tiles of each tile, int32 `(tiles, (2 * radius + 1)**ndim)`, raster order of offsets.

        Entries are positions in `index`, -1 where the neighbour is masked or outside the image. The table
        is built once per radius and shared by all stages and layers.
        """
        return remember(self, radius, lambda: self._build_neighbours(radius))

    def _build_neighbours(self, radius: int) -> Tensor:
        if _takes_cuda(self.device, self.ndim):
            return torch.ops.sparsecnx_cuda.neighbour_table(self.index, self.slots(), self.grid, radius)
        # Slots of a grid padded by `radius` on every side, so that no offset leaves its image.
        padded = [size + 2 * radius for size in self.grid]
        image, *place = self.positions()
        centre = image
        for coordinate, size in zip(place, padded, strict=True):
            centre = centre * size + coordinate + radius
        slots = self._number(centre, self.batch * math.prod(padded))
        # Computed on the device: a list of offsets would be copied there.
        shift = torch.zeros(1, dtype=torch.int64, device=self.device)
        steps = torch.arange(-radius, radius + 1, device=self.device)
        for size in padded:
            shift = (shift[:, None] * size + steps).flatten()
        return slots[centre[:, None] + shift]

    def _number(self, places: Tensor, count: int) -> Tensor:
        """int32 `(count,)`: the position of each visible tile at its place, int64 `(tiles,)`; -1 elsewhere."""
        blank = torch.full((count,), -1, dtype=torch.int32, device=self.device)
        return blank.index_copy(0, places, torch.arange(self.count, dtype=torch.int32, device=self.device))


@dataclass(frozen=True, eq=False)
class Layout:
    """A `TileSet` at one stride of a network: the geometry of a `SparseTensor`'s rows.

    Attributes:
        tiles: the visible tiles.
        tile: sites per tile side (8, 4, 2, 1 in the four stages of a ConvNeXt with 32-pixel patches).
        stride: pixels of the original input per site and axis.
    """

    tiles: TileSet
    tile: int
    stride: int = 1
    _tables: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _captured: bool = field(default_factory=lambda: _capturing(), repr=False)

    @classmethod
    def from_mask(
        cls, mask: Tensor, shape: tuple[int, ...], visible: int | None = None, count: int | None = None
    ) -> Layout:
        """Layout of a dense tensor with spatial `shape` under `mask`, bool `(B, L)` or `(B, *grid)`.

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
        return self.tiles.ndim

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape in sites, `(H, W)` in two dimensions."""
        return tuple(size * self.tile for size in self.tiles.grid)

    @property
    def sites_per_tile(self) -> int:
        return self.tile**self.ndim

    @property
    def rows(self) -> int:
        """Number of active sites in the batch."""
        return self.tiles.count * self.sites_per_tile

    @property
    def rows_per_image(self) -> int | None:
        """Active sites in every image, or None where images differ."""
        return None if self.tiles.visible is None else self.tiles.visible * self.sites_per_tile

    @property
    def row_splits(self) -> Tensor:
        """int64 `(batch + 1,)`: the rows of image `n` are `row_splits[n]:row_splits[n + 1]`."""
        return remember(self, (), lambda: self.tiles.splits * self.sites_per_tile)

    def coarsen(self, factor: int) -> Layout:
        """The layout after a convolution with stride `factor`.

        Raises:
            ValueError: `factor` does not divide the tile side.
        """
        if factor < 1 or self.tile % factor:
            raise ValueError(f"stride is {factor}: it must divide the tile side, {self.tile} sites")
        if factor == 1:
            return self
        return Layout(self.tiles, self.tile // factor, self.stride * factor)

    def coordinates(self) -> Tensor:
        """int32 `(rows, 1 + ndim)`: image, then position in multiples of `stride`, (n, y, x) in 2-D."""
        image, *place = self.tiles.positions()
        sites = tile_sites(self.tile, self.ndim, self.device)
        corner = torch.stack(place, dim=-1) * self.tile
        position = (corner[:, None, :] + sites) * self.stride
        image = image[:, None, None].expand(-1, self.sites_per_tile, 1)
        return torch.cat([image, position], dim=-1).flatten(0, 1).to(torch.int32)

    def row_image(self) -> Tensor:
        """int64 `(rows,)`: the image each row belongs to."""
        return self.tiles.positions()[0][:, None].expand(-1, self.sites_per_tile).flatten()

    def kernel_map(self, kernel: tuple[int, ...], stride: int, padding: tuple[int, ...]) -> Tensor:
        """Input row read by each output row of a convolution, int32 `(rows_out, prod(kernel))`.

        Output site `o` reads input sites `o * stride - padding + k` for `k` in raster order over the
        kernel; -1 where that site is masked or outside. Built once per layout and geometry.

        Raises:
            ValueError: `stride` does not divide the tile side.
        """
        key = (kernel, stride, padding)
        return remember(self, key, lambda: self._build_kernel_map(*key))

    def _build_kernel_map(self, kernel: tuple[int, ...], stride: int, padding: tuple[int, ...]) -> Tensor:
        coarse = self.coarsen(stride)
        site = tile_sites(coarse.tile, self.ndim, self.device) * stride
        # Offsets of the taps, computed on the device: a list of them would be copied there.
        axes = [torch.arange(-p, k - p, device=self.device) for k, p in zip(kernel, padding, strict=True)]
        taps = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        # Position of the site that is read, relative to the corner of the output site's own tile.
        reads = site[:, None, :] + taps[None, :, :]
        tile_step = reads.div(self.tile, rounding_mode="floor")
        inside = reads - tile_step * self.tile
        reach = max(
            max(math.ceil(p / self.tile), (self.tile - stride - p + k - 1) // self.tile)
            for k, p in zip(kernel, padding, strict=True)
        )
        width = 2 * reach + 1
        step_index = torch.zeros_like(tile_step[..., 0])
        raster = torch.zeros_like(step_index)
        for d in range(self.ndim):
            step_index = step_index * width + tile_step[..., d] + reach
            raster = raster * self.tile + inside[..., d]
        neighbour = self.tiles.neighbours(reach)[:, step_index]
        rows = neighbour * self.sites_per_tile + self._raster_to_nested()[raster].to(torch.int32)
        table = torch.where(neighbour >= 0, rows, -1)
        return table.flatten(0, 1)

    def _raster_to_nested(self) -> Tensor:
        """int64 `(T**ndim,)`: nested index of each site of a tile, listed in raster order."""
        sites = tile_sites(self.tile, self.ndim, self.device)
        raster = torch.zeros_like(sites[:, 0])
        for d in range(self.ndim):
            raster = raster * self.tile + sites[:, d]
        return raster.argsort()


def remember(owner: TileSet | Layout, key: Any, build: Callable[[], Tensor]) -> Tensor:
    """The table of that key, built on first use. What is kept serves later calls in any mode: tables are ordinary
    tensors also under inference mode, those of fake tensors are not kept, each stream of a GPU has its own, and what
    a CUDA graph computes is kept only by a geometry that the graph computes too."""
    key = key, _stream(owner.device)
    if key in owner._tables:
        return owner._tables[key]
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            table = build()
    else:
        table = build()
    if type(table) is Tensor and owner._captured == _capturing():
        owner._tables[key] = table
    return table


def _takes_cuda(device: torch.device, ndim: int) -> bool:
    """Whether the GPU operators build the geometry: where they were asked for by name, and under `auto` on a GPU where
    they were measured to be faster than the operators of torch that otherwise do."""
    asked = selected()
    if ndim > 3 or not (asked == "cuda" or (asked == "auto" and device.type == "cuda")):
        return False
    if cuda.refusal(device) is not None:
        return False
    return asked == "cuda" or compare(("geometry",), device, torch.float32, 1).backend == "cuda"


def _said(name: str, value: int) -> str:
    """For messages. A number written into a graph's text would fix it there: another one would compile anew."""
    return name if torch.compiler.is_compiling() else f"{name}={value}"


def _insist(holds: Tensor, message: str) -> None:
    """Raises where a bool `()` is False: ValueError at once on the CPU, else an assertion on the device."""
    if holds.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def _capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """The stream in which a device works now; 0 where there is only one."""
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def check_mask(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The mask as `(B, prod(grid))`.

    Raises:
        TypeError: not a bool tensor.
        ValueError: the shape does not fit `grid`.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}: expected a bool tensor, True = masked")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: expected torch.bool, True = masked")
    shape = tuple(mask.shape)
    if mask.ndim == 0 or shape[1:] not in ((math.prod(grid),), tuple(grid)):
        batch, name = shape[0] if shape else "B", _by(grid)
        raise ValueError(f"mask is {shape}: a {name} grid needs {(batch, math.prod(grid))}")
    return mask.flatten(1) if mask.ndim > 2 else mask.reshape(shape[0], math.prod(grid))


def infer_grid(mask: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Grid and tile side for a mask `(B, L)` or `(B, *grid)` over a dense tensor of spatial `shape`.

    Raises:
        TypeError: `mask` is not a tensor.
        ValueError: no tile with equal sides fits.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}: expected a bool tensor, True = masked")
    if mask.ndim == 1 + len(shape) and len(shape) > 1:
        grid = tuple(mask.shape[1:])
        tile = shape[0] // grid[0] if grid[0] else 0
    elif mask.ndim == 2:
        cells = mask.shape[1]
        tile = round((math.prod(shape) / cells) ** (1 / len(shape))) if cells else 0
        grid = tuple(size // tile for size in shape) if tile else ()
        if math.prod(grid) != cells:
            tile = 0
    else:
        raise ValueError(
            f"mask is {tuple(mask.shape)}: expected (B, L) or (B, {', '.join('g' * len(shape))}) "
            f"for a tensor of {_by(shape)} sites"
        )
    if tile == 0 or any(size != cells * tile for size, cells in zip(shape, grid, strict=True)):
        raise ValueError(
            f"mask is {tuple(mask.shape)}: no grid of square tiles with that many cells divides {_by(shape)} sites "
            "evenly"
        )
    return grid, tile


def _by(shape: tuple[int, ...]) -> str:
    """For messages. Of sizes that torch.compile leaves open a graph can make no text, so only where one is raised."""
    return "x".join(map(str, shape))


if compiled.loaded:

    @torch.library.register_fake("sparsecnx_cuda::tile_index")
    def _(mask: Tensor, count: int, visible: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, cells = mask.shape
        index, splits = (mask.new_empty(size, dtype=torch.int64) for size in (count, batch + 1))
        return index, splits, mask.new_empty(batch * cells, dtype=torch.int32)

    @torch.library.register_fake("sparsecnx_cuda::neighbour_table")
    def _(index: Tensor, slots: Tensor, grid: list[int], radius: int) -> Tensor:
        return index.new_empty(index.shape[0], (2 * radius + 1) ** len(grid), dtype=torch.int32)
