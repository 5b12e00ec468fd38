"""Sparsity patterns given by coordinates: any sites, in any number of dimensions.

Where tiles are visible, `sparsecnx.geometry.layout` knows every neighbour by arithmetic. Here nothing is assumed: sites
are rows of integer coordinates. Which of them a kernel reads is looked up once for each pattern, into a kernel map. A
pattern that does consist of tiles is recognised and carries its `Layout`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.tables import ordinary_tensors
from sparsecnx.geometry.tiles import TileSet

LARGEST_TILE = 32  # sites per side: a patch of a masked autoencoder at full resolution
CELLS_PER_SITE = 32  # up to which a bounding box has a table of all its cells; a sparser one is searched by bisection
SMALL_BOX = 2**20  # cells up to which a box always has a table
MOST_CELLS = 2**62  # that an int64 can number
MAP_ENTRIES = 2**22  # of a kernel map that are looked up at a time


class CoordinateMap:
    """Distinct sites of a batch of images, in a fixed order of rows.

    Args:
        stride: step between neighbouring sites along each axis, in units of the coordinates.
        coordinates: int32 `(rows, 1 + ndim)`: image, then position; no two rows equal. Or None: those of `layout`.
        layout: the same sites as tiles, where they are made of tiles.
        order: int64 `(rows,)`: for every row of `layout` the row here; None where both orders are the same.
    """

    def __init__(
        self,
        stride: Sequence[int],
        coordinates: Tensor | None = None,
        layout: Layout | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.stride = tuple(stride)
        self.layout = layout
        self.order = order
        if coordinates is not None:
            self.coordinates = coordinates
        elif layout is None:
            raise ValueError("coordinates is None: expected them where there is no layout")

    @classmethod
    def from_coordinates(cls, coordinates: Tensor, stride: Sequence[int]) -> CoordinateMap:
        """Map sites in the order of `coordinates`, int32 `(rows, 1 + ndim)`, all distinct; tiles are recognised."""
        with ordinary_tensors():
            found = CoordinateMap(stride, coordinates)
            found.layout = tiles_of(coordinates, found.stride)
            if found.layout is not None:
                order = found.find(found.layout.coordinates()).long()
                in_order = torch.arange(found.rows, device=found.device)
                found.order = None if torch.equal(order, in_order) else order
        return found

    @cached_property
    def coordinates(self) -> Tensor:
        """int32 `(rows, 1 + ndim)`: image, then position."""
        assert self.layout is not None  # The constructor makes sure of it.
        with ordinary_tensors():
            return self.layout.coordinates()

    @cached_property
    def back(self) -> Tensor:
        """int64 `(rows,)`: for every row here the row of `layout`; undoes `order`."""
        assert self.order is not None  # Otherwise there is nothing to undo.
        with ordinary_tensors():
            return self.order.argsort()

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    @property
    def rows(self) -> int:
        return self.coordinates.shape[0] if self.layout is None else self.layout.rows

    @property
    def device(self) -> torch.device:
        return self.coordinates.device if self.layout is None else self.layout.device

    @cached_property
    def bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest coordinate along each axis, the image first. The map must have sites."""
        if self.layout is None:
            low, high = self.coordinates.aminmax(dim=0)
        else:
            low, high = torch.stack(self.layout.tiles.positions()).aminmax(dim=1)
            sides = list(zip(self.layout.tile, self.layout.stride, strict=True))
            step = low.new_tensor([1, *(side * stride for side, stride in sides)])
            inside = low.new_tensor([0, *((side - 1) * stride for side, stride in sides)])
            low, high = low * step, high * step + inside
        lowest, highest = torch.stack([low, high]).tolist()
        return tuple(lowest), tuple(highest)

    @cached_property
    def images(self) -> Images:
        """The images that have sites, and the rows of each."""
        with ordinary_tensors():
            image = self.coordinates[:, 0].long()
            index, number, counts = torch.unique(image, return_inverse=True, return_counts=True)
            in_order = bool((image.diff() >= 0).all())
        return Images(index, number, counts, in_order)

    def find(self, coordinates: Tensor) -> Tensor:
        """Return the row of each site of integer `(n, 1 + ndim)`, -1 where it is not here: int32 `(n,)`."""
        if self.rows == 0:
            return coordinates.new_full((coordinates.shape[0],), -1, dtype=torch.int32)
        return self._box.find(coordinates.long().unbind(dim=1))

    def strided(self, factors: Sequence[int]) -> CoordinateMap:
        """Return the output sites of a convolution with a stride of `factors` along the axes.

        They are the multiples of the new stride that have a site here between them and the next multiple.
        """
        stride = tuple(step * factor for step, factor in zip(self.stride, factors, strict=True))
        if self.layout is not None and len(set(factors)) == 1 and self.layout.tile[0] % factors[0] == 0:
            return CoordinateMap(stride, layout=self.layout.coarsen(factors[0]))
        with ordinary_tensors():
            step = self.coordinates.new_tensor(stride)
            position = self.coordinates[:, 1:].div(step, rounding_mode="floor") * step
            return CoordinateMap(stride, unique(torch.cat([self.coordinates[:, :1], position], dim=1)))

    def refined(self, factor: int) -> CoordinateMap:
        """Return all sites of these tiles at a stride that is smaller by `factor`: undoes `strided`."""
        assert self.layout is not None  # Only maps of tiles are refined.
        return CoordinateMap([step // factor for step in self.stride], layout=self.layout.refine(factor))

    def spread(self, offsets: Tensor, stride: Sequence[int]) -> CoordinateMap:
        """Return all sites at `offsets`, integer `(K, ndim)`, from the sites here."""
        with ordinary_tensors():
            position = self.coordinates[:, None, 1:] + offsets.to(self.coordinates)
            image = self.coordinates[:, None, :1].expand(-1, offsets.shape[0], 1)
            return CoordinateMap(stride, unique(torch.cat([image, position], dim=2).flatten(0, 1)))

    def kernel_map(self, out: CoordinateMap, offsets: Tensor) -> Tensor:
        """Return the row here that each tap reads for each site of `out`, int32 `(out.rows, K)`, -1 for none.

        Args:
            out: the output sites.
            offsets: integer `(K, ndim)`, where each tap reads from the output site.
        """
        table = torch.full((out.rows, offsets.shape[0]), -1, dtype=torch.int32, device=self.device)
        if self.rows and out.rows:
            offsets = torch.nn.functional.pad(offsets.to(self.device, torch.int64), (1, 0))  # The image stays the same.
            chunk = max(1, MAP_ENTRIES // max(1, offsets.shape[0]))
            for sites, entries in zip(out.coordinates.split(chunk), table.split(chunk), strict=True):
                reads = sites.long()[:, None, :] + offsets
                entries.copy_(self._box.find(reads.unbind(dim=2)))
        return table

    @cached_property
    def _box(self) -> _Box:
        with ordinary_tensors():
            return _Box(self.coordinates, self.stride, self.bounds)


@dataclass(frozen=True)
class Images:
    """The images of a map that have sites, ascending, and the rows of each.

    Attributes:
        index: int64 `(images,)`, number of each image in its batch.
        number: int64 `(rows,)`, position in `index` of the image of each row.
        counts: int64 `(images,)`, rows of each image.
        in_order: whether the rows of one image lie behind those of another.
    """

    index: Tensor
    number: Tensor
    counts: Tensor
    in_order: bool

    @cached_property
    def rows(self) -> list[Tensor]:
        """int64, ascending: the rows of each image."""
        with ordinary_tensors():
            by_image = self.number.argsort(stable=True)
            return list(by_image.split(self.counts.tolist()))

    @cached_property
    def sizes(self) -> list[int] | None:
        """Rows of image 0, 1 and so on up to the last that has any; None where they are not in order."""
        return [len(rows) for rows in self.rows_by_number] if self.in_order else None

    @cached_property
    def rows_by_number(self) -> list[Tensor]:
        """int64, ascending: the rows of image 0, 1 and so on up to the last that has sites; none for one without."""
        numbers = self.index.tolist()
        with ordinary_tensors():
            nothing = self.number.new_empty(0)
        found = [nothing] * (numbers[-1] + 1 if numbers else 0)
        for number, rows in zip(numbers, self.rows, strict=True):
            found[number] = rows
        return found


class _Box:
    """A look-up of sites by the number of their cell in a box around them."""

    def __init__(
        self, coordinates: Tensor, stride: Sequence[int], bounds: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> None:
        self.low, high = bounds
        position = coordinates.long() - coordinates.new_tensor(self.low)
        steps = (1, *(max(1, step) for step in stride))  # A map of origins has stride 0: one site for each image.
        regular = not (position % position.new_tensor(steps)).any()
        self.steps = steps if regular else (1,) * len(steps)
        self.extents = [(top - low) // step + 1 for low, top, step in zip(self.low, high, self.steps, strict=True)]
        cells = math.prod(self.extents)
        if cells > MOST_CELLS:
            raise ValueError(
                f"coordinates lie in a box of {' x '.join(map(str, self.extents))} cells: more than 2^62 of them"
            )
        number = self._number(coordinates.long().unbind(dim=1))[0]
        rows = torch.arange(number.shape[0], dtype=torch.int32, device=number.device)
        self.table: Tensor | None = None
        if cells <= max(SMALL_BOX, CELLS_PER_SITE * number.shape[0]):
            self.table = rows.new_full((cells,), -1).index_copy(0, number, rows)
        else:
            self.sorted, order = number.sort()
            self.sorted_rows = rows[order]

    def find(self, axes: Sequence[Tensor]) -> Tensor:
        """Return the row at each place, int32, -1 for none. Places are one int64 tensor for each axis."""
        number, inside = self._number(axes)
        number = number.where(inside, 0)
        if self.table is not None:
            return self.table[number].where(inside, -1)
        place = torch.searchsorted(self.sorted, number).clamp(max=self.sorted.shape[0] - 1)
        return self.sorted_rows[place].where(inside & (self.sorted[place] == number), -1)

    def _number(self, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the number of the cell at each place, and whether there is one."""
        number, inside = torch.zeros_like(axes[0]), torch.ones_like(axes[0], dtype=torch.bool)
        for axis, low, step, extent in zip(axes, self.low, self.steps, self.extents, strict=True):
            cell = axis - low
            if step > 1:
                inside = inside & (cell % step == 0)
                cell = cell.div(step, rounding_mode="floor")
            inside = inside & (cell >= 0) & (cell < extent)
            number = number * extent + cell
        return number, inside


def unique(coordinates: Tensor) -> Tensor:
    """Return the distinct rows of int32 `(rows, 1 + ndim)`, ascending: by image, then in raster order."""
    return torch.unique(coordinates, dim=0) if coordinates.shape[0] else coordinates


def tiles_of(coordinates: Tensor, stride: Sequence[int]) -> Layout | None:
    """Return the layout of the same sites where they consist of full tiles, of the largest size that fits, or None.

    Single sites are not tiles.

    Args:
        coordinates: int32 `(rows, 1 + ndim)`, all distinct.
        stride: step between sites along each axis; a layout has the same along all.
    """
    ndim, step = len(stride), stride[0]
    if not coordinates.shape[0] or len(set(stride)) > 1 or step < 1 or not 1 <= ndim <= 3:
        return None
    low, high = torch.stack(coordinates.aminmax(dim=0)).tolist()
    if min(low) < 0 or (step > 1 and bool((coordinates[:, 1:] % step).any())):
        return None
    position = coordinates[:, 1:].long() // step
    extents = [top // step + 1 for top in high[1:]]
    batch = high[0] + 1
    tile = LARGEST_TILE
    while tile > 1:
        grid = tuple(-(-extent // tile) for extent in extents)
        cells = batch * math.prod(grid)
        if coordinates.shape[0] % tile**ndim == 0 and cells <= max(SMALL_BOX, coordinates.shape[0]):
            cell = coordinates[:, 0].long()
            for axis, size in enumerate(grid):
                cell = cell * size + position[:, axis] // tile
            sites = torch.bincount(cell, minlength=cells)
            if bool(((sites == 0) | (sites == tile**ndim)).all()):
                tiles = TileSet.from_mask((sites == 0).view(batch, *grid), grid)
                return Layout(tiles, tile, step)
        tile //= 2
    return None


def tiles_of_mask(active: Tensor) -> Layout | None:
    """Do as `tiles_of` for the active sites of a dense tensor, bool `(B, *spatial)`; tiles divide the spatial shape."""
    batch, *shape = active.shape
    tile = math.gcd(*shape, LARGEST_TILE)
    while tile > 1:
        grid = tuple(size // tile for size in shape)
        cells = active.reshape(batch, *itertools.chain.from_iterable((size, tile) for size in grid))
        inner = tuple(2 + 2 * axis for axis in range(len(shape)))
        full = cells.all(inner[-1])
        some = cells.any(inner[-1])
        for axis in reversed(inner[:-1]):
            full, some = full.all(axis), some.any(axis)
        if torch.equal(full, some):
            return Layout(TileSet.from_mask(~full, grid), tile)
        tile //= 2
    return None


def offsets_of(kernel: Sequence[int], step: Sequence[int]) -> Tensor:
    """Return where the taps of a kernel read, from its output site: int64 `(K, ndim)`.

    They are in MinkowskiEngine's order: the first axis varies fastest. Odd sizes are centred, even ones begin at the
    site.

    Args:
        kernel: sizes along the axes.
        step: distance of neighbouring taps along the axes.
    """
    axes = [
        [(place - (size // 2 if size % 2 else 0)) * distance for place in range(size)]
        for size, distance in zip(kernel, step, strict=True)
    ]
    return torch.tensor([taps[::-1] for taps in itertools.product(*axes[::-1])], dtype=torch.int64)
