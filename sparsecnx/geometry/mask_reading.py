"""Masks as people hold them: every shape, dtype and polarity that says without doubt which tiles are masked."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecnx.backends.registration import register
from sparsecnx.backends.transforms import transforms_active
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.masks import describe, format_shape

ONES = ("masked", "visible")
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Reading(NamedTuple):
    """One thing that the shape of a mask can mean.

    Attributes:
        images: masks that it holds: the batch, or 1 for all images together.
        grids: tiles per axis; several where a number of tiles fits several grids.
        in_line: whether the tiles of an image are along one axis of the mask, in raster order.
    """

    images: int
    grids: list[tuple[int, ...]]
    in_line: bool

    def in_words(self, batch: int) -> str:
        grid = self.grids[0]
        tiles = f"{math.prod(grid)} tiles in raster order" if self.in_line else f"a grid of {format_shape(grid)} tiles"
        return f"{tiles}, one for {f'each of {batch}' if self.images == batch else 'all'} images"


def read_mask(
    mask: Tensor,
    shape: tuple[int, ...],
    batch: int | None = None,
    ones: str = "masked",
    name: str = "dense",
    grid: tuple[int, ...] | None = None,
) -> Tensor:
    """Return a mask over images of spatial `shape` as bool `(batch, *grid)`, True = masked.

    Args:
        mask: see `SparseTensor.from_dense`.
        batch: number of images; None for as many as the mask is for.
        ones: what ones and True say of a tile, "masked" or "visible".
        name: what errors call the images.
        grid: the tiles per axis, where they are known. A mask of single sites must then be the same all over a tile.

    Raises:
        TypeError: `mask` is no tensor of bool, integers or floats.
        ValueError: its shape fits in no way, or in more than one; it has other values than 0 and 1, or requires grad;
            `ones` is neither.
    """
    if ones not in ONES:
        raise ValueError(f"ones is {ones!r}: expected one of {ONES}")
    if not isinstance(mask, Tensor) or not (mask.dtype in WHOLE or mask.is_floating_point()):
        raise TypeError(
            f"{describe(mask)}: expected a tensor (B, L) or (B, *grid) of bool, integers or floats, 0 and 1"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask requires grad, and would get none: pass mask.detach()")
    check_memory(mask=mask)
    given = tuple(mask.shape)
    images = batch if batch is not None else given[0] if given else 1
    readings = _readings(given, shape, images, grid)
    if not readings:
        raise ValueError(_misfit(given, shape, images, name, grid))
    if grid is None and 2 < len(given) == len(shape) and 1 < given[0] == batch and given != shape:
        raise ValueError(
            f"mask is {given}, which can be a grid of {format_shape(given)} tiles, one for all images, or a grid of "
            f"{format_shape(given[1:])} tiles for each of {batch} images, an axis short for {format_shape(shape)} "
            "sites: give it as (B, *grid), for example mask[None] or mask[:, None]"
        )
    reading = _only(readings, given, shape, images)
    masked = as_masked(mask, ones).reshape(reading.images, *reading.grids[0])
    if grid is not None and reading.grids[0] != grid:
        masked = _whole_tiles(masked, grid)
    return masked.expand(reading.images if batch is None else batch, *masked.shape[1:])


def check_same_device(mask: Tensor, images: Tensor, name: str) -> None:
    """Raise ValueError unless `mask` is on the device of the tensor `images`, which errors call `name`."""
    if isinstance(mask, Tensor) and mask.device != images.device:
        raise ValueError(f"mask is on {mask.device}, {name} on {images.device}: pass mask.to({name}.device)")


def as_masked(mask: Tensor, ones: str) -> Tensor:
    """Return a mask of zeros and ones as bool, True = masked.

    Raises:
        ValueError: it has other values. On a GPU an assertion on the device fails instead.
    """
    if mask.dtype == torch.bool:
        return mask if ones == "masked" else ~mask
    if torch.compiler.is_compiling() or transforms_active():
        masked: Tensor = torch.ops.sparsecnx_geometry.as_masked(mask, ones)
        return masked
    return _as_masked(mask, ones)


def _as_masked(mask: Tensor, ones: str) -> Tensor:
    one = mask == 1
    wrong = ~(one | (mask == 0))
    if mask.device.type != "cpu":
        torch._assert_async(~wrong.any(), "mask has other values than 0 and 1")
    elif type(mask) is Tensor and wrong.any():
        values = list(dict.fromkeys(f"{value:g}" for value in mask[wrong].unique().tolist()))  # Each NaN is unique.
        listed = ", ".join(values[:3] + ["..."] * (len(values) > 3))
        raise ValueError(f"mask has the values {listed}: expected 0 and 1; give a threshold, such as mask > 0.5")
    return one if ones == "masked" else ~one


register(
    "sparsecnx_geometry::as_masked",
    function=_as_masked,
    fake=lambda mask, ones: torch.empty_like(mask, dtype=torch.bool),
    public="SparseTensor.from_dense",
)


def _readings(
    given: tuple[int, ...], shape: tuple[int, ...], batch: int, grid: tuple[int, ...] | None
) -> list[Reading]:
    """Return all that the shape of a mask can mean."""
    found: list[Reading] = []
    for before in ((batch,), (batch, 1), (1,), (1, 1), ()):
        if given[: len(before)] != before:
            continue
        rest = given[len(before) :]
        if len(rest) == len(shape) and (divides(rest, shape) if grid is None else rest in (grid, shape)):
            found.append(Reading(before[0] if before else 1, [rest], in_line=False))
            if grid is None and len(before) == 1 and max(rest) == math.prod(rest):  # (B, L, 1) or (B, 1, L)
                square = [cells for cells in grids_of(max(rest), shape) if is_square(cells, shape)]
                found += [Reading(before[0], square, in_line=True)] * bool(square)
        elif len(rest) == 1 and len(before) < 2:
            grids = grids_of(rest[0], shape) if grid is None else [grid] * (rest[0] == math.prod(grid))
            found += [Reading(before[0] if before else 1, grids, in_line=True)] * bool(grids)
    return [one for i, one in enumerate(found) if all(one[:2] != other[:2] for other in found[:i])]


def _only(readings: list[Reading], given: tuple[int, ...], shape: tuple[int, ...], batch: int) -> Reading:
    """Return the one thing that a mask means; raise ValueError if there are two."""
    if len(readings) > 1 and len(given) == 2:
        # The masks of MAE, (B, L) on square tiles, are hardly ever meant as a grid of tiles that are not square.
        square = [one for one in readings if is_square(one.grids[0], shape)]
        if len(square) == 1 and square[0].in_line:
            readings = square
    if len(readings) > 1:
        first, second = readings[:2]
        shapes = [(one.images, *grid) for one in readings[:2] for grid in one.grids[:2]]
        views = " or ".join(f"mask.view{(view[0], 1, *view[1:]) if given in shapes else view}" for view in shapes)
        raise ValueError(
            f"mask is {given}, which can be {first.in_words(batch)}, or {second.in_words(batch)}: give it as "
            f"(B, *grid), for example {views}"
        )
    if len(readings[0].grids) > 1:
        some = " or ".join(format_shape(grid) for grid in readings[0].grids[:2])
        raise ValueError(
            f"mask is {given}: its tiles can be a grid of {some}, on {format_shape(shape)} sites none of them square; "
            "give the mask as (B, *grid)"
        )
    return readings[0]


def _misfit(given: tuple[int, ...], shape: tuple[int, ...], batch: int, name: str, grid: tuple[int, ...] | None) -> str:
    """Return what is wrong with the shape of a mask that has no meaning."""
    if given and given[0] not in (1, batch) and _readings(given, shape, given[0], grid):
        return f"mask is {given}: {name} holds {batch} images"
    if grid is not None:
        needed = f"({batch}, {math.prod(grid)}) or {(batch, *grid)}"
        return f"mask is {given}: a {format_shape(grid)} grid needs {needed}, or one of these for all images"
    if len(given) in (2, 1 + len(shape), 2 + len(shape)):
        return f"mask is {given}: no grid of tiles with that many cells divides {format_shape(shape)} sites evenly"
    axes = ", ".join("g" * len(shape))
    return (
        f"mask is {given}: expected (B, L), (B, {axes}) or (B, 1, {axes}), with 1 or nothing for B where one mask is "
        f"for all images, for a tensor of {format_shape(shape)} sites"
    )


def _whole_tiles(masked: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the mask of tiles `(B, *grid)` of a mask of sites, which must be the same all over a tile."""
    sides = [part for size, cells in zip(masked.shape[1:], grid, strict=True) for part in (cells, size // cells)]
    cells, inner = masked.reshape(masked.shape[0], *sides), range(2, 2 + 2 * len(grid), 2)
    tiles = cells.amax(tuple(inner))
    whole = (tiles == cells.amin(tuple(inner))).all()
    message = f"mask is {tuple(masked.shape)}: expected one value all over each of its tiles"
    if masked.device.type == "cpu" and type(masked) is Tensor and not torch.compiler.is_compiling():
        if not whole:
            raise ValueError(f"{message} of {format_shape(tuple(sides[1::2]))} sites")
    else:
        torch._assert_async(whole, message)
    return tiles


def divides(grid: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether every axis of `shape` has a whole number of sites for each tile."""
    return all(cells > 0 and size > 0 and size % cells == 0 for cells, size in zip(grid, shape, strict=True))


def is_square(grid: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the tiles of a grid have equal sides."""
    return all(size * grid[0] == shape[0] * cells for cells, size in zip(grid, shape, strict=True))


def grids_of(cells: int, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the grids with that many tiles that divide `shape`: the one of square tiles, or else all others.

    The first are those whose tiles are nearest to squares.
    """
    if cells == 0 or math.prod(shape) == 0 or math.prod(shape) % cells:
        return []
    side = round((math.prod(shape) / cells) ** (1 / len(shape)))
    grid = tuple(size // side for size in shape) if side else ()
    if side and math.prod(grid) == cells and all(size % side == 0 for size in shape):
        return [grid]
    choices = [[count for count in range(1, min(size, cells) + 1) if size % count == 0] for size in map(int, shape[1:])]
    found = []
    for rest in itertools.product(*choices):
        each = math.prod(rest)
        first = cells // each  # torch.compile traces no divmod of sizes that vary.
        if cells % each == 0 and first > 0 and shape[0] % first == 0:
            found.append((first, *rest))
    if len(found) < 2:  # torch.compile sorts by no sizes that vary.
        return found
    return sorted(found, key=lambda grid: (sum(size // n for size, n in zip(shape, grid, strict=True)), grid))


def tile_of_sites(masked: Tensor) -> tuple[int, ...]:
    """Return the largest tile that a mask of single sites, bool `(B, *spatial)`, consists of. Its values are read.

    It is square where there are square tiles of more than one site.
    """
    sides = []
    for axis in range(1, masked.ndim):
        size = masked.shape[axis]
        change = masked.narrow(axis, 1, size - 1) != masked.narrow(axis, 0, size - 1)
        edges = change.movedim(axis, 0).flatten(1).any(1).nonzero().flatten() + 1
        sides.append(math.gcd(size, *edges.tolist()))
    side = math.gcd(*sides)
    return (side,) * len(sides) if side > 1 else tuple(sides)
