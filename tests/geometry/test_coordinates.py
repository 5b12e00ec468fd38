"""Compare sparsity patterns given by coordinates with dictionaries of sites."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import draw_mask
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecnx import Layout
from sparsecnx.geometry import coordinates as geometry
from sparsecnx.geometry.coordinates import CoordinateMap, offsets_of, tiles_of, tiles_of_mask, unique


def sites(mask: Tensor, *, shuffled: bool = False, corner: int = 0, stride: int = 1) -> Tensor:
    """Return int32 coordinates of the sites where a mask `(B, *spatial)` is False."""
    found = (~mask).nonzero()
    found[:, 1:] = (found[:, 1:] + corner) * stride
    if shuffled:
        found = found[torch.randperm(len(found))]
    return found.to(torch.int32)


@st.composite
def patterns(draw: Any) -> tuple[Tensor, int]:
    """Draw coordinates in any order, anywhere, and their stride."""
    shape = tuple(draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 3))))
    mask = draw_mask("random counts", draw(st.integers(1, 3)), shape, draw(st.integers(0, 999)))
    stride = draw(st.integers(1, 3))
    return sites(mask, shuffled=draw(st.booleans()), corner=draw(st.integers(-4, 4)), stride=stride), stride


def row_of(coordinates: Tensor) -> dict[tuple[int, ...], int]:
    return {tuple(site): row for row, site in enumerate(coordinates.tolist())}


@given(patterns(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_kernel_maps_name_the_site_under_each_tap(
    pattern: tuple[Tensor, int], size: int, factor: int, bisect: bool
) -> None:
    coordinates, stride = pattern
    ndim = coordinates.shape[1] - 1
    known = CoordinateMap([stride] * ndim, coordinates)
    with pytest.MonkeyPatch.context() as patch:
        if bisect:  # as in a box with too many cells for a table
            patch.setattr(geometry, "SMALL_BOX", 0)
            patch.setattr(geometry, "CELLS_PER_SITE", 0)
        out = known.strided([factor] * ndim)
        offsets = offsets_of([size] * ndim, [stride] * ndim)
        found = known.kernel_map(out, offsets)
    rows = row_of(coordinates)
    expected = [
        [rows.get((image, *(p + o for p, o in zip(place, offset, strict=True))), -1) for offset in offsets.tolist()]
        for image, *place in out.coordinates.tolist()
    ]
    assert found.dtype == torch.int32
    assert found.tolist() == expected


@given(patterns(), st.integers(1, 3))
def test_strides_keep_every_multiple_with_a_site_behind_it(pattern: tuple[Tensor, int], factor: int) -> None:
    coordinates, stride = pattern
    step = stride * factor
    known = CoordinateMap([stride] * (coordinates.shape[1] - 1), coordinates)
    expected = {(image, *(p // step * step for p in place)) for image, *place in coordinates.tolist()}
    found = known.strided([factor] * known.ndim)
    assert found.stride == (step,) * known.ndim
    assert sorted(map(tuple, found.coordinates.tolist())) == sorted(expected)


@given(patterns())
def test_finds_its_own_sites_and_no_others(pattern: tuple[Tensor, int]) -> None:
    coordinates, stride = pattern
    known = CoordinateMap([stride] * (coordinates.shape[1] - 1), coordinates)
    assert known.find(coordinates).tolist() == list(range(len(coordinates)))
    moved = coordinates.clone()
    moved[:, 0] += 7
    assert (known.find(moved) == -1).all()


@pytest.mark.parametrize("shuffled", [False, True], ids=["raster", "shuffled"])
@pytest.mark.parametrize("tile", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 1, 2)], ids=lambda shape: f"{len(shape)}d")
def test_tiles_are_recognised(shape: tuple[int, ...], tile: int, shuffled: bool) -> None:
    if tile ** len(shape) > 1024:
        shape, tile = (2,) * len(shape), 8
    mask = draw_mask("random counts", 2, shape, seed=3)
    mask.view(2, -1)[:, 0], mask.view(2, -1)[:, -1] = False, True  # neither all visible nor none
    fine = mask
    for axis in range(1, mask.ndim):
        fine = fine.repeat_interleave(tile, axis)
    coordinates = sites(fine, shuffled=shuffled, stride=3)
    known = CoordinateMap.from_coordinates(coordinates, [3] * len(shape))
    assert known.layout is not None
    assert known.layout.side == tile
    assert known.layout.stride == (3,) * known.ndim
    rows = known.layout.coordinates()
    order = torch.arange(known.rows) if known.order is None else known.order
    assert torch.equal(rows, coordinates[order])
    assert known.order is None or torch.equal(known.back[order], torch.arange(known.rows))
    assert known.bounds == CoordinateMap(known.stride, coordinates).bounds


def test_the_largest_tile_is_taken() -> None:
    everything = sites(torch.zeros(1, 8, 16, dtype=torch.bool))
    layout = tiles_of(everything, [1, 1])
    assert layout is not None
    assert layout.side == 8


@pytest.mark.parametrize(
    ("coordinates", "stride"),
    [
        (torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0]]), (1, 1)),  # not full
        (torch.tensor([[0, y, x] for y in (1, 2) for x in (0, 1)]), (1, 1)),  # across a border
        (torch.tensor([[0, y, x] for y in (-2, -1) for x in (0, 1)]), (1, 1)),  # below zero
        (torch.tensor([[0, y, x] for y in (0, 2) for x in (0, 1)]), (2, 1)),  # strides differ
        (torch.tensor([[0, y, x] for y in (0, 2) for x in (1, 3)]), (2, 2)),  # between multiples of the stride
        (torch.zeros(0, 3, dtype=torch.int64), (1, 1)),
    ],
    ids=["part", "border", "negative", "strides", "between", "empty"],
)
def test_what_is_no_tile(coordinates: Tensor, stride: tuple[int, ...]) -> None:
    assert tiles_of(coordinates.to(torch.int32), stride) is None


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 2, 1)], ids=lambda shape: f"{len(shape)}d")
@pytest.mark.parametrize("tile", [2, 4])
def test_tiles_of_a_dense_mask(shape: tuple[int, ...], tile: int) -> None:
    mask = draw_mask("random counts", 3, shape, seed=1)
    mask.view(3, -1)[:, 0], mask.view(3, -1)[:, -1] = False, True
    fine = mask
    for axis in range(1, mask.ndim):
        fine = fine.repeat_interleave(tile, axis)
    layout = tiles_of_mask(~fine)
    assert layout is not None
    assert layout.side == tile
    assert torch.equal(layout.tiles.mask(), mask.flatten(1))
    fine.view(-1)[0] = ~fine.view(-1)[0]
    assert tiles_of_mask(~fine) is None


def test_offsets_centre_odd_kernels_and_begin_even_ones_at_the_site() -> None:
    assert offsets_of([3, 2], [1, 10]).tolist() == [[-1, 0], [0, 0], [1, 0], [-1, 10], [0, 10], [1, 10]]


def test_images_that_have_lost_their_sites_are_not_listed() -> None:
    known = CoordinateMap([1], torch.tensor([[3, 0], [1, 5], [3, 2]], dtype=torch.int32))
    assert known.images.index.tolist() == [1, 3]
    assert [rows.tolist() for rows in known.images.rows] == [[1], [0, 2]]


def test_rows_are_unique_in_raster_order() -> None:
    again = torch.tensor([[1, 0, 2], [0, 5, 1], [1, 0, 2], [0, 4, 9]], dtype=torch.int32)
    assert unique(again).tolist() == [[0, 4, 9], [0, 5, 1], [1, 0, 2]]


def test_coarse_and_fine_tiles() -> None:
    known = CoordinateMap((1, 1), layout=Layout.from_mask(torch.tensor([[True, False]]), (4, 8)))
    coarse = known.strided((2, 2))
    assert coarse.layout is not None
    assert (coarse.layout.side, coarse.stride) == (2, (2, 2))
    assert coarse.layout.tiles is known.layout.tiles  # type: ignore[union-attr]
    assert torch.equal(coarse.refined(2).coordinates, known.coordinates)
    third = known.strided((3, 3))
    assert third.layout is None
    assert third.coordinates.tolist() == [[0, y, x] for y, x in itertools.product((0, 3), (3, 6))]


def test_a_box_of_too_many_cells() -> None:
    far = torch.tensor([[0, 0, 0, 0], [1, 2**31 - 1, 2**31 - 1, 2**31 - 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="more than 2\\^62"):
        CoordinateMap((1, 1, 1), far).find(far)
    near = torch.tensor([[0, 0, 0], [1, 2**30, 2**30]], dtype=torch.int32)
    assert CoordinateMap((1, 1), near).find(near).tolist() == [0, 1]


def test_a_map_needs_sites() -> None:
    with pytest.raises(ValueError, match="coordinates is None"):
        CoordinateMap((1, 1))
