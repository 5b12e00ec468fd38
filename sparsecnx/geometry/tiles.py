"""The visible tiles of a batch of images, which all stages of a network share.

A mask is drawn on a coarse grid of *tiles* (patches). Nothing here is tied to two dimensions.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsecnx.backends.registration import register
from sparsecnx.backends.transforms import transforms_active
from sparsecnx.geometry.masks import check_mask, format_shape
from sparsecnx.geometry.tables import cached_table, capturing, current_stream, ordinary_tensors

T = TypeVar("T", bound=type)

BELOW_TILE = ("raise", "dense")


def opaque(cls: T) -> T:
    """Hide that `cls` is a dataclass.

    FSDP looks for tensors inside dataclasses and builds them anew: layers would no longer share their tables.
    """
    del cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls


@opaque
@dataclass(frozen=True, eq=False)
class TileSet:
    """The visible tiles of a batch of images. All stages of a network share them.

    Attributes:
        batch: number of images.
        grid: tiles per axis, `(gh, gw)` in two dimensions.
        index: int64 `(tiles,)`, ascending: `image * prod(grid) + raster position` of each visible tile.
        splits: int64 `(batch + 1,)`; the visible tiles of image `n` are `index[splits[n]:splits[n + 1]]`.
        visible: number of visible tiles in every image, or None where images differ or may differ.
        below_tile: what a network does whose stride leaves less than a site of a tile: "raise" an error, or go on
            "dense" from there, see `SparseTensor.from_dense`.

    Raises:
        ValueError: `below_tile` is neither.
    """

    batch: int
    grid: tuple[int, ...]
    index: Tensor
    splits: Tensor
    visible: int | None
    below_tile: str = "raise"
    tables: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    captured: bool = field(default_factory=capturing, repr=False)

    def __post_init__(self) -> None:
        if self.below_tile not in BELOW_TILE:
            raise ValueError(f"below_tile is {self.below_tile!r}: expected one of {BELOW_TILE}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tables out of copies and files: they are built anew."""
        return {**self.__dict__, "tables": {}, "captured": False}

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        grid: tuple[int, ...],
        visible: int | None = None,
        count: int | None = None,
        below_tile: str = "raise",
    ) -> TileSet:
        """List the visible tiles of a mask as in MAE: bool `(B, prod(grid))` or `(B, *grid)`, True = masked (removed).

        With `visible`, every image is known to keep that many tiles, with `count` the whole batch: nothing is read
        back from the device and no shape depends on data. Without them the mask is counted, one synchronisation on
        a GPU. `torch.compile(fullgraph=True)` then makes one graph for any number of tiles, from two on.

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
            return cls(batch, grid, index, splits, visible, below_tile)
        if known and (mask.device.type != "cpu" or torch.compiler.is_compiling()):
            return cls._without_reading(flat, grid, visible, count, below_tile)
        if torch.compiler.is_compiling():
            if _graph_has_sizes_of_data():
                return cls._of_unknown_size(flat, grid, below_tile)
            torch._dynamo.graph_break(
                msg="the mask must be counted: pass visible= (tiles that each image keeps) or count="
            )
        counts = _count_tiles(flat) if batch else []
        _check_counts(counts, visible, count)
        if not known and len(set(counts)) < 2:
            visible = counts[0] if counts else 0
        if mask.device.type != "cpu":  # One synchronisation was enough.
            return cls._without_reading(flat, grid, visible, sum(counts), below_tile)
        index = (~flat).flatten().nonzero().flatten()
        return cls(batch, grid, index, torch.tensor([0, *itertools.accumulate(counts)]), visible, below_tile)

    @classmethod
    def _without_reading(
        cls, flat: Tensor, grid: tuple[int, ...], visible: int | None, count: int | None, below_tile: str = "raise"
    ) -> TileSet:
        """List the visible tiles of a mask `(B, cells)` without reading it back to the host.

        A stable sort of the mask lists the visible tiles (False) first, in raster order.
        """
        batch, cells = flat.shape
        counts = (~flat).sum(dim=1)
        if visible is None:
            assert count is not None  # One of the two is known.
            torch._assert_async(counts.sum() == count, "mask does not keep count tiles in all")
            index = flat.flatten().to(torch.uint8).sort(stable=True).indices[:count]
            return cls(batch, grid, index, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), None, below_tile)
        torch._assert_async((counts == visible).all(), "mask does not keep visible tiles in every image")
        kept = flat.to(torch.uint8).sort(dim=1, stable=True).indices[:, :visible]
        image = torch.arange(batch, device=flat.device)
        index = (image[:, None] * cells + kept).flatten()
        splits = torch.arange(batch + 1, device=flat.device) * visible
        return cls(batch, grid, index, splits, visible, below_tile)

    @classmethod
    def _of_unknown_size(cls, flat: Tensor, grid: tuple[int, ...], below_tile: str) -> TileSet:
        """List the visible tiles of a mask `(B, cells)` in a graph for any number of them, from two on."""
        counts = (~flat).sum(dim=1)
        torch._assert_async(counts.sum() > 1, "mask keeps less than two tiles: pass visible= or count=")
        index = (~flat).flatten().nonzero().flatten()
        torch._check(index.shape[0] > 1)  # Normalizations ask whether there is a row, and a second one.
        splits = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(flat.shape[0], grid, index, splits, None, below_tile)

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

    def to(self, device: torch.device) -> TileSet:
        """Return the same tiles on another device; its tables are built anew."""
        index, splits = self.index.to(device), self.splits.to(device)
        return TileSet(self.batch, self.grid, index, splits, self.visible, self.below_tile)

    def difference(self, other: TileSet) -> str | None:
        """Return how two sets of tiles differ, in words; None where they are the same.

        Values are compared once for each pair of objects. Where torch.compile compiles and in a CUDA graph nothing can
        be read: an assertion on the device fails instead.
        """
        if other is self or (other.index is self.index and other.grid == self.grid and other.batch == self.batch):
            return None
        if other.device != self.device:
            return f"one is on {self.device}, the other on {other.device}"
        if other.batch != self.batch:
            return f"one has {self.batch} images, the other {other.batch}"
        if other.grid != self.grid:
            return f"one mask has {format_shape(self.grid)} tiles, the other {format_shape(other.grid)}"
        if other.count != self.count:
            return f"one mask keeps {self.count} tiles, the other {other.count}"
        if torch.compiler.is_compiling() or capturing():
            torch._assert_async((self.index == other.index).all(), "the masks of two SparseTensors differ")
            return None
        equal = _equal.setdefault(self, weakref.WeakSet())
        if other in equal:
            return None
        apart = (self.mask() != other.mask()).nonzero()
        if apart.shape[0]:
            return f"their masks differ in {apart.shape[0]} tiles, the first in image {int(apart[0, 0])}"
        equal.add(other)
        return None

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

    def neighbours(self, radius: tuple[int, ...]) -> Tensor:
        """Return the neighbouring tiles of each tile, int32 `(tiles, prod(2 * radius + 1))`, raster order of offsets.

        Entries are positions in `index`, -1 where the neighbour is masked or outside the image. The table is built once
        per radius and shared by all stages and layers.

        Args:
            radius: how many tiles to each side along each axis.
        """
        return cached_table(self, ("neighbours", radius), lambda: self._build_neighbours(radius))

    def _build_neighbours(self, radius: tuple[int, ...]) -> Tensor:
        centre, slots = self.margin(radius, radius)
        # The offsets are computed on the device: a list of them would be copied there.
        shift = torch.zeros(1, dtype=torch.int64, device=self.device)
        for size, reach in zip(self.grid, radius, strict=True):
            steps = torch.arange(-reach, reach + 1, device=self.device)
            shift = (shift[:, None] * (size + 2 * reach) + steps).flatten()
        return slots[centre[:, None] + shift]

    def margin(self, before: Sequence[int], after: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Number the tiles of a grid with more tiles before and after it along each axis, all of them masked.

        Returns:
            The number of each visible tile, int64 `(tiles,)`, and for every number the position in `index`, -1 for
            none, int32. A step from a visible tile stays in its image if the margin is as wide.
        """
        centre, *places = self.positions()
        sizes = [size + low + high for size, low, high in zip(self.grid, before, after, strict=True)]
        for place, size, low in zip(places, sizes, before, strict=True):
            centre = centre * size + place + low
        return centre, self._number(centre, self.batch * math.prod(sizes))

    def _number(self, places: Tensor, count: int) -> Tensor:
        """Return int32 `(count,)`: the position of each visible tile at its place, int64 `(tiles,)`; -1 elsewhere."""
        blank = torch.full((count,), -1, dtype=torch.int32, device=self.device)
        return blank.index_copy(0, places, torch.arange(self.count, dtype=torch.int32, device=self.device))


@torch.compiler.assume_constant_result
def _graph_has_sizes_of_data() -> bool:
    """Return whether torch.compile keeps sizes that depend on data in its graph, as it does with fullgraph=True."""
    context: Any = torch._guards.TracingContext.try_get()
    return context is not None and context.fake_mode.shape_env.allow_dynamic_output_shape_ops


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

_equal: weakref.WeakKeyDictionary[TileSet, weakref.WeakSet[TileSet]] = weakref.WeakKeyDictionary()

MOST_KEPT = 8  # geometries of which nothing is masked
_all_visible: dict[Any, TileSet] = {}
