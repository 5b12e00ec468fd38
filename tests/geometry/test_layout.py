"""Compare row order, neighbour tables and kernel maps with brute force over coordinates."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import (
    DEVICE,
    MASKS,
    assert_close,
    draw_mask,
    example_layout,
    layouts,
    make_layout,
    masks,
    needs_gpu,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import Layout, SparseTensor, TileSet, use_backend
from sparsecnx.geometry import tiles as visible_tiles
from sparsecnx.geometry.nested_order import children_are_consecutive, rows_to_tile, tile_sites, tile_to_rows

NDIMS = pytest.mark.parametrize("ndim", [1, 2, 3], ids=["1d", "2d", "3d"])
ONES = (1, 1)
READS_DATA = {"aten::nonzero", "aten::_local_scalar_dense"}


class Recorder(TorchDispatchMode):
    """List the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@st.composite
def any_layouts(draw: Any, tiles: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> Layout:
    """Draw a layout in one to three dimensions."""
    ndim = draw(st.integers(1, 3))
    return draw(layouts(ndim, sites=(16, 12, 8)[ndim - 1], tiles=tiles))


def site_rows(layout: Layout) -> dict[tuple[int, ...], int]:
    """Return the row of each active site by image and position in sites."""
    coordinates = layout.coordinates()
    assert (coordinates[:, 1:] % torch.tensor(layout.stride) == 0).all()
    coordinates[:, 1:] //= torch.tensor(layout.stride)
    return {tuple(site): row for row, site in enumerate(coordinates.tolist())}


@NDIMS
@pytest.mark.parametrize("tile", [*range(1, 13), 16, 24])
def test_nested_order_is_a_bijection(tile: int, ndim: int) -> None:
    sites = tile_sites((tile,) * ndim)
    assert sites.shape == (tile**ndim, ndim) and sites.dtype == torch.int64
    assert sorted(sites.tolist()) == [list(site) for site in itertools.product(range(tile), repeat=ndim)]
    tiles = torch.arange(2 * tile**ndim * 3).view(2, *([tile] * ndim), 3)
    rows = tile_to_rows(tiles)
    assert torch.equal(rows, tiles[(slice(None), *sites.T)].flatten(0, 1))
    assert torch.equal(rows_to_tile(rows, (tile,) * ndim), tiles)


def test_nested_order_spelled_out() -> None:
    square = torch.zeros(4, 4, dtype=torch.int64)
    square[tuple(tile_sites((4, 4)).T)] = torch.arange(16)
    assert square.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(tile_sites((5, 5)), torch.tensor(list(itertools.product(range(5), repeat=2))))
    assert tile_sites((6, 6))[:12:4].tolist() == [[0, 0], [0, 2], [0, 4]]


@given(st.integers(1, 3).flatmap(lambda ndim: st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 12])] * ndim)))
def test_nested_order_of_sides_that_differ(tile: tuple[int, ...]) -> None:
    """The finest level halves every even side; the order of what is left is that of the coarser tile."""
    sites = tile_sites(tile)
    assert sorted(sites.tolist()) == [list(site) for site in itertools.product(*map(range, tile))]
    tiles = torch.randn(2, *tile, 3)
    assert torch.equal(tile_to_rows(tiles), tiles[(slice(None), *sites.T)].flatten(0, 1))
    assert torch.equal(rows_to_tile(tile_to_rows(tiles), tile), tiles)
    level = torch.tensor([2 - side % 2 for side in tile])
    coarse = tile_sites(tuple(side // int(step) for side, step in zip(tile, level, strict=True)))
    children = torch.tensor(list(itertools.product(*map(range, level.tolist()))))
    if any(side % 2 == 0 for side in tile):
        assert torch.equal(sites, (coarse[:, None] * level + children).flatten(0, 1))


@given(st.data(), st.integers(1, 3).flatmap(lambda ndim: st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 12])] * ndim)))
def test_strides_whose_children_are_consecutive_rows(data: st.DataObject, tile: tuple[int, ...]) -> None:
    """A product takes the rows of a patch as they lie exactly where they are those of each output site in turn."""
    stride = tuple(data.draw(st.sampled_from([s for s in range(1, side + 1) if side % s == 0])) for side in tile)
    coarse = tile_sites(tuple(side // step for side, step in zip(tile, stride, strict=True)))
    in_turn = (coarse[:, None] * torch.tensor(stride) + tile_sites(stride)).flatten(0, 1)
    assert children_are_consecutive(tile, stride) == torch.equal(in_turn, tile_sites(tile))


def test_strides_whose_children_are_consecutive_rows_spelled_out() -> None:
    for tile, stride, expected in [
        ((8, 8), (4, 4), True),
        ((12, 12), (3, 3), False),  # The odd side is above all halvings.
        ((12,), (3,), True),  # Along one axis every order is the same.
        ((4, 16, 16), (2, 2, 2), True),
        ((4, 16, 16), (1, 2, 2), False),  # The finest level halves the first axis too.
        ((1, 4, 4), (1, 2, 2), True),
        ((5, 7), (1, 7), True),  # raster order
    ]:
        assert children_are_consecutive(tile, stride) is expected


@NDIMS
@pytest.mark.parametrize("tile", [2, 4, 6, 8, 12, 16])
def test_children_of_a_site_are_consecutive_rows_at_every_level(tile: int, ndim: int) -> None:
    fine = make_layout(draw_mask("equal counts", 2, (3, 1, 2)[:ndim], seed=1), tile)
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=ndim)))
    while fine.side % 2 == 0:
        coarse = fine.coarsen(2)
        assert (coarse.side, coarse.stride) == (fine.side // 2, tuple(2 * step for step in fine.stride))
        assert coarse.tiles is fine.tiles and coarse.rows * 2**ndim == fine.rows > 0
        children = fine.coordinates().view(coarse.rows, 2**ndim, 1 + ndim)
        parents = coarse.coordinates()[:, None, :]
        assert torch.equal(children[..., :1], parents[..., :1].expand(-1, 2**ndim, -1))
        parent_sites, child_sites = parents[..., 1:] // coarse.stride[0], children[..., 1:] // fine.stride[0]
        assert torch.equal(child_sites.long(), parent_sites * 2 + offsets)
        fine = coarse


@given(any_layouts(), st.sampled_from([1, 2, 4]))
def test_rows_are_the_sites_of_visible_tiles(layout: Layout, stride: int) -> None:
    mask = layout.tiles.mask().view(layout.batch, *layout.tiles.grid)
    layout = Layout(layout.tiles, layout.tile, stride)
    coordinates = layout.coordinates()
    assert coordinates.dtype == torch.int32 and coordinates.shape == (layout.rows, 1 + layout.ndim)
    everywhere = itertools.product(range(layout.batch), *map(range, layout.shape))
    active = [site for site in everywhere if not mask[(site[0], *(p // layout.side for p in site[1:]))]]
    assert sorted(site_rows(layout)) == active

    image = layout.row_image()
    assert image.dtype == torch.int32 and torch.equal(image, coordinates[:, 0])
    assert image.is_contiguous() and layout.row_image() is image  # kernels read it in order
    assert torch.equal(layout.row_splits.diff(), image.bincount(minlength=layout.batch))
    assert layout.row_splits[0] == 0 and layout.row_splits is layout.row_splits
    counts = set(layout.row_splits.diff().tolist())
    assert layout.rows_per_image == (counts.pop() if len(counts) == 1 else None)


@NDIMS
@pytest.mark.parametrize("kind", MASKS)
def test_mask_round_trip(kind: str, ndim: int) -> None:
    mask = draw_mask(kind, 3, (3, 2, 4)[:ndim], seed=7)
    for given_mask in (mask, mask.flatten(1)):
        tiles = TileSet.from_mask(given_mask, (3, 2, 4)[:ndim])
        assert torch.equal(tiles.mask(), mask.flatten(1))
        assert tiles.count == (~mask).sum() and tiles.ndim == ndim
        assert torch.equal(torch.stack(tiles.positions(), dim=1), (~mask).nonzero())
        assert torch.equal(tiles.splits.diff(), (~mask).flatten(1).sum(1))
        assert torch.equal(tiles.index, tiles.index.sort().values)
        slots = tiles.slots()
        assert slots.dtype == torch.int32 and tiles.slots() is slots
        assert torch.equal(slots[tiles.index], torch.arange(tiles.count, dtype=torch.int32))
        assert torch.equal(slots < 0, mask.flatten())


def test_nothing_masked() -> None:
    tiles, expected = TileSet.all_visible(3, (2, 4), DEVICE), TileSet.from_mask(torch.zeros(3, 8) > 0, (2, 4))
    assert (tiles.batch, tiles.grid, tiles.visible) == (expected.batch, expected.grid, expected.visible)
    assert torch.equal(tiles.index.cpu(), expected.index) and torch.equal(tiles.splits.cpu(), expected.splits)


def test_the_geometry_of_nothing_masked_is_kept() -> None:
    tiles = TileSet.all_visible(3, (2, 4), DEVICE)
    assert TileSet.all_visible(3, (2, 4), DEVICE) is tiles
    with FakeTensorMode():
        assert isinstance(TileSet.all_visible(3, (2, 4), DEVICE).index, FakeTensor)
    with ThreadPoolExecutor(4) as pool:
        batches = [batch % 11 + 1 for batch in range(400)]
        found = pool.map(lambda batch: TileSet.all_visible(batch, (1, 2), DEVICE), batches)
        assert [tiles.index.shape[0] for tiles in found] == [2 * batch for batch in batches]
    assert len(visible_tiles._all_visible) <= visible_tiles.MOST_KEPT + 4
    assert TileSet.all_visible(3, (2, 4), DEVICE) is not tiles


@given(st.data(), st.integers(1, 3))
def test_what_is_known_gives_the_same_tiles(data: st.DataObject, ndim: int) -> None:
    mask, _ = data.draw(masks(ndim))
    counts, cells = (~mask).flatten(1).sum(1).tolist(), mask[0].numel()
    counted = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    assert counted.visible == (counts[0] if len(set(counts)) == 1 else None)
    known = [TileSet.from_mask(mask, counted.grid, count=counted.count)]
    assert known[0].visible is None
    if counted.visible is not None:
        known.append(TileSet.from_mask(mask, counted.grid, counted.visible))
        assert known[1].visible == counted.visible
    for tiles in known:
        for found, expected in ((tiles.index, counted.index), (tiles.splits, counted.splits)):
            assert found.dtype == expected.dtype == torch.int64 and torch.equal(found, expected)
    for visible in {*counts, counts[0] - 1, counts[0] + 1} & set(range(cells + 1)) - {counted.visible}:
        with pytest.raises(ValueError, match=f"mask does not keep visible={visible} tiles in every image"):
            TileSet.from_mask(mask, counted.grid, visible)
    for count in {counted.count - 1, counted.count + 1} & set(range(mask.numel() + 1)):
        with pytest.raises(ValueError, match=f"mask does not keep count={count} tiles in all"):
            TileSet.from_mask(mask, counted.grid, count=count)


@given(st.data(), st.integers(1, 3))
def test_neighbours(data: st.DataObject, ndim: int) -> None:
    radius = tuple(data.draw(st.lists(st.integers(0, 2), min_size=ndim, max_size=ndim)))
    mask, _ = data.draw(masks(ndim))
    tiles = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    places = [tuple(place) for place in torch.stack(tiles.positions(), dim=1).tolist()]
    order = {place: i for i, place in enumerate(places)}
    steps = list(itertools.product(*(range(-reach, reach + 1) for reach in radius)))
    expected = [[order.get((n, *map(sum, zip(at, step, strict=True))), -1) for step in steps] for n, *at in places]
    table = tiles.neighbours(radius)
    assert table.dtype == torch.int32 and table.shape == (tiles.count, len(steps))
    assert table.tolist() == expected
    assert tiles.neighbours(radius) is table


@pytest.mark.parametrize("factor", [-2, 0, 4, 5, 12])
def test_coarsen_refuses_what_does_not_divide_the_tile(factor: int) -> None:
    layout = example_layout(tile=6)
    message = f"stride is {factor}: it must divide the tile side, 6 sites"
    with pytest.raises(ValueError, match=message):
        layout.coarsen(factor)


def test_coarsen() -> None:
    layout = example_layout(tile=12)
    assert layout.coarsen(1) is layout
    coarse = layout.coarsen(3).coarsen(2)
    assert (coarse.tile, coarse.stride, coarse.shape, coarse.sites_per_tile) == ((2, 2), (6, 6), (6, 4), 4)
    assert set(coarse.coordinates()[:, 1:].unique().tolist()) <= set(range(0, 36, 6))


def test_sides_and_strides_of_their_own_for_each_axis() -> None:
    tiles = TileSet.from_mask(draw_mask("random counts", 2, (3, 2), seed=1), (3, 2))
    layout = Layout(tiles, (4, 6), (1, 2))
    assert (layout.shape, layout.sites_per_tile, layout.side) == ((12, 12), 24, None)
    coarse = layout.coarsen((2, 3))
    assert (coarse.tile, coarse.stride, coarse.side, coarse.tiles) == ((2, 2), (2, 6), 2, tiles)
    fine = coarse.refine((2, 3))
    assert (fine.tile, fine.stride) == (layout.tile, layout.stride) and fine.difference(layout) is None
    assert coarse.refine(4).stride == (1, 1)  # Sites are then smaller than pixels.
    message = (
        r"stride is \(2, 4\): it must divide the tile of 4x6 sites; take larger patches, or .*below_tile=\"dense\""
    )
    with pytest.raises(ValueError, match=message):
        layout.coarsen((2, 4))
    for factor in (0, (2, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"factor is .*: expected a positive number, or one for each of 2 axes"):
            layout.refine(factor)


def test_difference_of_layouts_in_words() -> None:
    mask = draw_mask("equal counts", 2, (3, 2), seed=2)
    layout, moved = make_layout(mask, 4), mask.clone()
    moved[1] = moved[1].roll(1, 0)
    assert layout.difference(layout) is None and layout.difference(make_layout(mask, 4)) is None
    for other, words in [
        (layout.coarsen(2), "one has 4x4 sites per tile, the other 2x2"),
        (make_layout(mask[:1], 4), "one has 2 images, the other 1"),
        (make_layout(mask[:, :, :1], 4), "one mask has 3x2 tiles, the other 3x1"),
        (make_layout(torch.zeros_like(mask), 4), "one mask keeps 6 tiles, the other 12"),
        (make_layout(moved, 4), r"their masks differ in [24] tiles, the first in image 1"),
        (Layout(layout.tiles.to(torch.device("meta")), 4), "one is on cpu, the other on meta"),
    ]:
        assert re.fullmatch(words, layout.difference(other) or "")


def test_what_to_do_below_the_tile_is_kept() -> None:
    mask = draw_mask("equal counts", 2, (3, 2), seed=2)
    for known in ({}, {"visible": 3}, {"count": 6}):
        assert TileSet.from_mask(mask, (3, 2), **known, below_tile="dense").below_tile == "dense"
    assert TileSet.from_mask(mask, (3, 2)).below_tile == "raise"
    with pytest.raises(ValueError, match=r"below_tile is 'silent': expected one of \('raise', 'dense'\)"):
        TileSet.from_mask(mask, (3, 2), below_tile="silent")
    x = SparseTensor(torch.zeros(96, 1), Layout(TileSet.from_mask(mask, (3, 2), below_tile="dense"), 4))
    assert x.layout.coarsen(2).tiles.to(torch.device("meta")).below_tile == "dense"
    again = pytree.tree_unflatten([value.clone() for value in pytree.tree_leaves(x)], pytree.tree_structure(x))
    assert pickle.loads(pickle.dumps(x)).layout.tiles.below_tile == again.layout.tiles.below_tile == "dense"


def test_grid_is_inferred_from_the_shapes() -> None:
    def found(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int | None]:
        layout = Layout.from_mask(torch.zeros(mask_shape, dtype=torch.bool), shape)
        assert layout.shape == shape
        return layout.tiles.grid, layout.side

    assert found((2, 49), (224, 224)) == ((7, 7), 32)
    assert found((2, 6), (24, 16)) == found((2, 3, 2), (24, 16)) == ((3, 2), 8)
    assert found((1, 5), (35,)) == ((5,), 7)
    assert found((1, 12), (6, 4, 4)) == found((1, 3, 2, 2), (6, 4, 4)) == ((3, 2, 2), 2)
    assert found((1, 3, 2), (12, 10)) == ((3, 2), None)  # 4x5 sites


FLAT = torch.zeros(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TileSet.from_mask([[True]], (1,)), TypeError, "mask is a list: expected a bool tensor"),
        (
            lambda: TileSet.from_mask(FLAT.float(), (2, 3)),
            TypeError,
            r"mask is torch\.float32 \(.*\): expected a bool tensor \(B, ",
        ),
        (lambda: TileSet.from_mask(FLAT, (2, 2)), ValueError, r"mask is \(2, 6\): a 2x2 grid needs \(2, 4\)"),
        (lambda: TileSet.from_mask(FLAT.view(2, 3, 2), (2, 3)), ValueError, r"mask is \(2, 3, 2\): a 2x3 grid needs"),
        (lambda: TileSet.from_mask(FLAT[0, 0], (2, 3)), ValueError, r"mask is \(\): a 2x3 grid needs \('B', 6\)"),
        (lambda: Layout.from_mask(None, (4, 6)), TypeError, "mask is a NoneType: expected a tensor"),
        (lambda: Layout.from_mask(FLAT[0], (5, 7)), ValueError, r"mask is \(6,\): expected \(B, L\), \(B, g, g\) or"),
        (lambda: Layout.from_mask(FLAT[None, None, None], (4, 6)), ValueError, "for a tensor of 4x6 sites"),
        (lambda: Layout.from_mask(FLAT, (4, 4)), ValueError, r"mask is \(2, 6\): no grid of tiles .* 4x4 sites"),
        (lambda: Layout.from_mask(FLAT, (5, 7)), ValueError, "no grid of tiles .* 5x7 sites"),
        (lambda: Layout.from_mask(FLAT.view(2, 2, 3), (4, 8)), ValueError, "no grid of tiles .* 4x8 sites"),
        (lambda: Layout.from_mask(FLAT[:, :0], (4, 4)), ValueError, r"mask is \(2, 0\): no grid"),
        (lambda: Layout.from_mask(FLAT, (0, 0)), ValueError, "no grid of tiles .* 0x0 sites"),
        (lambda: Layout.from_mask(FLAT, (7,)), ValueError, "no grid of tiles .* 7 sites"),
        (lambda: Layout.from_mask(FLAT, (4, 6), -1), ValueError, "visible is -1: a grid of 6 tiles keeps 0 to 6"),
        (lambda: Layout.from_mask(FLAT, (4, 6), 7), ValueError, "visible is 7: a grid of 6 tiles keeps 0 to 6"),
        (lambda: Layout.from_mask(FLAT, (4, 6), count=-1), ValueError, "count is -1: 2 images of 6 tiles keep 0 to 12"),
        (lambda: Layout.from_mask(FLAT, (4, 6), count=13), ValueError, "count is 13: 2 images of 6 tiles keep 0 to 12"),
        (lambda: Layout.from_mask(FLAT, (4, 6), 3, 5), ValueError, "count is 5: 2 images with visible=3 keep 6"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def geometry(mask: Tensor, **known: int) -> tuple[Tensor, ...]:
    """Return all that a network asks of a layout."""
    layout = Layout.from_mask(mask, (12, 8), **known)
    maps = [layout.kernel_map((3, 3), ONES, ONES, ONES), layout.inverse_map((2, 2), (2, 2), (0, 0), ONES)]
    return (layout.tiles.index, layout.row_splits, layout.coordinates(), layout.tiles.mask(), *maps)


# Each is a fact about a mask `(2, 3, 2)` that keeps 3 tiles in every image, and the end of the error where it is false.
KNOWN = pytest.mark.parametrize(
    ("known", "message"),
    [({"visible": 3}, "visible=3 tiles in every image"), ({"count": 6}, "count=6 tiles in all")],
    ids=["visible", "count"],
)


@KNOWN
@pytest.mark.parametrize("device", ["meta", pytest.param(DEVICE.type, marks=needs_gpu)])
def test_what_is_known_leaves_no_shape_to_data(known: dict[str, int], message: str, device: str) -> None:
    with Recorder() as recorder:
        geometry(draw_mask("equal counts", 2, (3, 2), seed=2).to(device), **known)
    assert not READS_DATA & set(recorder.names)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_mask_of_unknown_count_compiles(fullgraph: bool) -> None:
    images, mask = torch.randn(2, 3, 4, 6), torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1]]).bool()

    def run(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return SparseTensor.from_dense(images, mask).features + 1

    torch.compiler.reset()
    assert torch.equal(torch.compile(run, fullgraph=fullgraph, backend="eager")(images, mask), run(images, mask))


@KNOWN
def test_what_is_known_compiles_to_one_graph_that_reads_nothing_back(known: dict[str, int], message: str) -> None:
    mask = draw_mask("equal counts", 2, (3, 2), seed=2).to(DEVICE)
    ran: list[str] = []

    def recording(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            with Recorder() as recorder:
                out = graph(*args)
            ran.extend(recorder.names)
            return out

        return run

    def run(mask: Tensor) -> tuple[Tensor, ...]:
        return geometry(mask, **known)

    expected = run(mask.cpu())
    for compiler in ("eager", "aot_eager", recording):
        torch.compiler.reset()
        compiled = torch.compile(run, fullgraph=True, backend=compiler)
        for found, wanted in zip(compiled(mask), expected, strict=True):
            assert torch.equal(found.cpu(), wanted)
        if DEVICE.type == "cpu":  # On a GPU a process cannot go on after an assertion that fails.
            with pytest.raises(RuntimeError, match=f"mask does not keep {re.sub('=[0-9]+', '', message)}"):
                compiled(torch.zeros_like(mask))
    assert ran and not READS_DATA & set(ran)


@pytest.mark.parametrize("known", ["visible", "count"])
def test_one_compilation_serves_every_batch_and_image_size(known: str) -> None:
    """Geometry, gather, scatter and their gradients compile once where torch.compile leaves sizes open."""

    def run(images: Tensor, mask: Tensor, known_tiles: dict[str, int]) -> tuple[Tensor, ...]:
        x = SparseTensor.from_dense(images, mask, **known_tiles)
        return x.with_features(2 * x.features).dense(), x.layout.tiles.neighbours((1, 1)), x.layout.row_splits

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes are equal in the first call: torch.compile would take them for one size.
    for batch, grid in ((5, (3, 2)), (7, (3, 2)), (4, (3, 2)), (6, (7, 3))):
        mask = (torch.rand(batch, math.prod(grid)).argsort(1).argsort(1) >= 3).view(batch, *grid).to(DEVICE)
        images = torch.randn(batch, 9, *(4 * size for size in grid), device=DEVICE, requires_grad=True)
        tiles = {"visible": 3} if known == "visible" else {"count": 3 * batch}
        found = compiled(images, mask, tiles)
        with use_backend("reference"):
            expected = run(images, mask, tiles)
        for value, wanted in zip(found, expected, strict=True):
            assert torch.equal(value, wanted)
        gradients = [torch.autograd.grad(out[0].sin().sum(), images)[0] for out in (found, expected)]
        assert_close(*gradients, 1e-6)
    assert counter.frame_count == 1
