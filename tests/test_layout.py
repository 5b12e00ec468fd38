"""Row order, neighbour tables and kernel maps against brute force over coordinates."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import cuda_emulator
import pytest
import torch
from cases import (
    DEVICE,
    MASKS,
    assert_close,
    device_of,
    draw_mask,
    example_layout,
    layouts,
    make_layout,
    masks,
    needs_cuda,
    needs_cpu,
)
from cuda_emulator import guarded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import Layout, SparseTensor, TileSet, layout, use_backend
from sparsecnx.choices import Comparison
from sparsecnx.geometry.nested_order import rows_to_tile, tile_sites, tile_to_rows

SIDES = range(1, 25)
NDIMS = pytest.mark.parametrize("ndim", [1, 2, 3], ids=["1d", "2d", "3d"])
READS_DATA = {"aten::nonzero", "aten::_local_scalar_dense"}


class Recorder(TorchDispatchMode):
    """Lists the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@st.composite
def any_layouts(draw: Any, tiles: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> Layout:
    """In one to three dimensions."""
    ndim = draw(st.integers(1, 3))
    return draw(layouts(ndim, sites=(16, 12, 8)[ndim - 1], tiles=tiles))


def site_rows(layout: Layout) -> dict[tuple[int, ...], int]:
    """Row of each active site by image and position in sites."""
    coordinates = layout.coordinates()
    assert (coordinates[:, 1:] % layout.stride == 0).all()
    coordinates[:, 1:] //= layout.stride
    return {tuple(site): row for row, site in enumerate(coordinates.tolist())}


@NDIMS
@pytest.mark.parametrize("tile", SIDES)
def test_nested_order_is_a_bijection(tile: int, ndim: int) -> None:
    sites = tile_sites(tile, ndim)
    assert sites.shape == (tile**ndim, ndim) and sites.dtype == torch.int64
    assert sorted(sites.tolist()) == [list(site) for site in itertools.product(range(tile), repeat=ndim)]
    tiles = torch.arange(2 * tile**ndim * 3).view(2, *([tile] * ndim), 3)
    rows = tile_to_rows(tiles, ndim)
    assert torch.equal(rows, tiles[(slice(None), *sites.T)].flatten(0, 1))
    assert torch.equal(rows_to_tile(rows, tile, ndim), tiles)


def test_nested_order_spelled_out() -> None:
    square = torch.zeros(4, 4, dtype=torch.int64)
    square[tuple(tile_sites(4, 2).T)] = torch.arange(16)
    assert square.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(tile_sites(5, 2), torch.tensor(list(itertools.product(range(5), repeat=2))))
    assert tile_sites(6, 2)[:12:4].tolist() == [[0, 0], [0, 2], [0, 4]]


@NDIMS
@pytest.mark.parametrize("tile", [tile for tile in SIDES if tile % 2 == 0])
def test_children_of_a_site_are_consecutive_rows_at_every_level(tile: int, ndim: int) -> None:
    fine = make_layout(draw_mask("equal counts", 2, (3, 1, 2)[:ndim], seed=1), tile)
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=ndim)))
    while fine.tile % 2 == 0:
        coarse = fine.coarsen(2)
        assert (coarse.tile, coarse.stride) == (fine.tile // 2, fine.stride * 2)
        assert coarse.tiles is fine.tiles and coarse.rows * 2**ndim == fine.rows > 0
        children = fine.coordinates().view(coarse.rows, 2**ndim, 1 + ndim)
        parents = coarse.coordinates()[:, None, :]
        assert torch.equal(children[..., :1], parents[..., :1].expand(-1, 2**ndim, -1))
        parent_sites, child_sites = parents[..., 1:] // coarse.stride, children[..., 1:] // fine.stride
        assert torch.equal(child_sites.long(), parent_sites * 2 + offsets)
        fine = coarse


@given(any_layouts(), st.sampled_from([1, 2, 4]))
def test_rows_are_the_sites_of_visible_tiles(layout: Layout, stride: int) -> None:
    mask = layout.tiles.mask().view(layout.batch, *layout.tiles.grid)
    layout = Layout(layout.tiles, layout.tile, stride)
    coordinates = layout.coordinates()
    assert coordinates.dtype == torch.int32 and coordinates.shape == (layout.rows, 1 + layout.ndim)
    everywhere = itertools.product(range(layout.batch), *map(range, layout.shape))
    active = [site for site in everywhere if not mask[(site[0], *(p // layout.tile for p in site[1:]))]]
    assert sorted(site_rows(layout)) == active

    image = layout.row_image()
    assert torch.equal(image, coordinates[:, 0].long())
    assert torch.equal(layout.row_splits.diff(), image.bincount(minlength=layout.batch))
    assert layout.row_splits[0] == 0 and layout.row_splits is layout.row_splits
    counts = set(layout.row_splits.diff().tolist())
    assert layout.rows_per_image == (counts.pop() if len(counts) == 1 else None)


@pytest.mark.parametrize("ndim", [1, 2, 3])
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


def test_no_rows_at_all() -> None:
    layout = make_layout(draw_mask("none visible", 2, (2, 3), seed=0), 4)
    assert (layout.rows, layout.rows_per_image, layout.shape) == (0, 0, (8, 12))
    assert layout.coordinates().shape == (0, 3)
    assert layout.row_splits.tolist() == [0, 0, 0]
    assert layout.row_image().shape == (0,)
    assert layout.kernel_map((3, 3), 1, (1, 1)).shape == (0, 9)


@given(st.data(), st.integers(1, 3))
def test_visible_equals_the_counted_path(data: st.DataObject, ndim: int) -> None:
    mask, _ = data.draw(masks(ndim))
    counts = (~mask).flatten(1).sum(1).tolist()
    counted = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    assert counted.visible == (counts[0] if len(set(counts)) == 1 else None)
    if counted.visible is None:
        for count in counts:
            with pytest.raises(ValueError, match=f"mask does not keep visible={count} tiles in every image"):
                TileSet.from_mask(mask, counted.grid, count)
        return
    known = TileSet.from_mask(mask, counted.grid, counted.visible)
    assert known.visible == counted.visible
    for found, expected in ((known.index, counted.index), (known.splits, counted.splits)):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)


@given(st.data(), st.integers(1, 3))
def test_count_equals_the_counted_path(data: st.DataObject, ndim: int) -> None:
    mask, _ = data.draw(masks(ndim))
    counted = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    known = TileSet.from_mask(mask, counted.grid, count=counted.count)
    assert known.visible is None and known.batch == counted.batch
    for found, expected in ((known.index, counted.index), (known.splits, counted.splits)):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)
    for count in {counted.count - 1, counted.count + 1} & set(range(mask.numel() + 1)):
        with pytest.raises(ValueError, match=f"mask does not keep count={count} tiles in all"):
            TileSet.from_mask(mask, counted.grid, count=count)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"count": -1}, "count is -1: 2 images of 6 tiles keep 0 to 12"),
        ({"count": 13}, "count is 13: 2 images of 6 tiles keep 0 to 12"),
        ({"visible": 3, "count": 5}, "count is 5: 2 images with visible=3 keep 6"),
    ],
    ids=str,
)
def test_count_that_cannot_be(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.from_mask(torch.zeros(2, 6, dtype=torch.bool), (4, 6), **numbers)


def test_from_dense_with_count() -> None:
    mask, dense = draw_mask("random counts", 2, (3, 2), seed=1), torch.randn(2, 5, 12, 8)
    expected = SparseTensor.from_dense(dense, mask)
    found = SparseTensor.from_dense(dense, mask, count=int((~mask).sum()))
    assert torch.equal(found.features, expected.features)
    with pytest.raises(ValueError, match="mask does not keep count=3 tiles in all"):
        SparseTensor.from_dense(dense, mask, count=3)


@pytest.mark.parametrize("visible", [-1, 7])
def test_visible_out_of_range(visible: int) -> None:
    with pytest.raises(ValueError, match=rf"visible is {visible}: a grid of 6 tiles keeps 0 to 6"):
        TileSet.from_mask(torch.zeros(2, 6, dtype=torch.bool), (2, 3), visible)


@pytest.mark.parametrize("visible", [0, 2, 5])
def test_wrong_visible(visible: int) -> None:
    mask = torch.tensor([[False, False, False, True, True, True]] * 2)
    with pytest.raises(ValueError, match=f"mask does not keep visible={visible} tiles in every image"):
        Layout.from_mask(mask, (4, 6), visible)


@given(st.data(), st.integers(1, 3), st.integers(0, 2))
def test_neighbours(data: st.DataObject, ndim: int, radius: int) -> None:
    mask, _ = data.draw(masks(ndim))
    tiles = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    places = [tuple(place) for place in torch.stack(tiles.positions(), dim=1).tolist()]
    order = {place: i for i, place in enumerate(places)}
    steps = list(itertools.product(range(-radius, radius + 1), repeat=ndim))
    expected = [[order.get((n, *map(sum, zip(at, step, strict=True))), -1) for step in steps] for n, *at in places]
    table = tiles.neighbours(radius)
    assert table.dtype == torch.int32 and table.shape == (tiles.count, len(steps))
    assert table.tolist() == expected
    assert tiles.neighbours(radius) is table


@given(st.data(), any_layouts())
def test_kernel_map(data: st.DataObject, layout: Layout) -> None:
    sizes = st.integers(1, 5 if layout.ndim < 3 else 3)
    kernel = tuple(data.draw(sizes) for _ in range(layout.ndim))
    padding = tuple(data.draw(st.integers(0, size)) for size in kernel)
    stride = data.draw(st.sampled_from([s for s in range(1, layout.tile + 1) if layout.tile % s == 0]))
    rows, taps = site_rows(layout), list(itertools.product(*map(range, kernel)))
    expected = []
    for image, *site in site_rows(layout.coarsen(stride)):
        reads = ((o * stride - p + k for o, p, k in zip(site, padding, tap, strict=True)) for tap in taps)
        expected.append([rows.get((image, *read), -1) for read in reads])
    table = layout.kernel_map(kernel, stride, padding)
    assert table.dtype == torch.int32
    assert table.shape == (layout.coarsen(stride).rows, math.prod(kernel))
    assert table.tolist() == expected
    assert layout.kernel_map(kernel, stride, padding) is table


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_kernel_map_reaches_beyond_the_next_tile(size: int, tile: int) -> None:
    layout = example_layout(batch=2, grid=(5, 4), tile=tile)
    rows = site_rows(layout)
    padding = size // 2
    table = layout.kernel_map((size, size), 1, (padding, padding)).tolist()
    for (image, y, x), found in zip(rows, table, strict=True):
        taps = itertools.product(range(-padding, size - padding), repeat=2)
        assert found == [rows.get((image, y + dy, x + dx), -1) for dy, dx in taps]


@pytest.mark.parametrize("factor", [-2, 0, 4, 5, 12])
def test_coarsen_refuses_what_does_not_divide_the_tile(factor: int) -> None:
    layout = example_layout(tile=6)
    message = f"stride is {factor}: it must divide the tile side, 6 sites"
    with pytest.raises(ValueError, match=message):
        layout.coarsen(factor)
    with pytest.raises(ValueError, match=message):
        layout.kernel_map((3, 3), factor, (1, 1))


def test_coarsen() -> None:
    layout = example_layout(tile=12)
    assert layout.coarsen(1) is layout
    coarse = layout.coarsen(3).coarsen(2)
    assert (coarse.tile, coarse.stride, coarse.shape, coarse.sites_per_tile) == (2, 6, (6, 4), 4)
    assert set(coarse.coordinates()[:, 1:].unique().tolist()) <= set(range(0, 36, 6))


def test_grid_is_inferred_from_the_shapes() -> None:
    def found(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        layout = Layout.from_mask(torch.zeros(mask_shape, dtype=torch.bool), shape)
        assert layout.shape == shape
        return layout.tiles.grid, layout.tile

    assert found((2, 49), (224, 224)) == ((7, 7), 32)
    assert found((2, 6), (24, 16)) == found((2, 3, 2), (24, 16)) == ((3, 2), 8)
    assert found((1, 5), (35,)) == ((5,), 7)
    assert found((1, 12), (6, 4, 4)) == found((1, 3, 2, 2), (6, 4, 4)) == ((3, 2, 2), 2)
    assert found((1, 5, 7), (5, 7)) == ((5, 7), 1)


FLAT = torch.zeros(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TileSet.from_mask([[True]], (1,)), TypeError, "mask is a list: expected a bool tensor"),
        (lambda: TileSet.from_mask(FLAT.float(), (2, 3)), TypeError, r"mask is torch\.float32: expected torch\.bool"),
        (lambda: TileSet.from_mask(FLAT, (2, 2)), ValueError, r"mask is \(2, 6\): a 2x2 grid needs \(2, 4\)"),
        (lambda: TileSet.from_mask(FLAT.view(2, 3, 2), (2, 3)), ValueError, r"mask is \(2, 3, 2\): a 2x3 grid needs"),
        (lambda: TileSet.from_mask(FLAT[0, 0], (2, 3)), ValueError, r"mask is \(\): a 2x3 grid needs \('B', 6\)"),
        (lambda: Layout.from_mask(None, (4, 6)), TypeError, "mask is a NoneType: expected a bool tensor"),
        (lambda: Layout.from_mask(FLAT.int(), (4, 6)), TypeError, r"mask is torch\.int32: expected torch\.bool"),
        (lambda: Layout.from_mask(FLAT[0], (4, 6)), ValueError, r"mask is \(6,\): expected \(B, L\) or \(B, g, g\)"),
        (lambda: Layout.from_mask(FLAT[None, None], (4, 6)), ValueError, "for a tensor of 4x6 sites"),
        (lambda: Layout.from_mask(FLAT, (4, 4)), ValueError, r"mask is \(2, 6\): no grid of square tiles .* 4x4 sites"),
        (lambda: Layout.from_mask(FLAT, (5, 7)), ValueError, "no grid of square tiles .* 5x7 sites"),
        (lambda: Layout.from_mask(FLAT.view(2, 2, 3), (4, 9)), ValueError, "no grid of square tiles .* 4x9 sites"),
        (lambda: Layout.from_mask(FLAT[:, :0], (4, 4)), ValueError, r"mask is \(2, 0\): no grid"),
        (lambda: Layout.from_mask(FLAT, (0, 0)), ValueError, "no grid of square tiles .* 0x0 sites"),
        (lambda: Layout.from_mask(FLAT, (7,)), ValueError, "no grid of square tiles .* 7 sites"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def geometry(mask: Tensor, **known: int) -> tuple[Tensor, ...]:
    """All that a network asks of a layout."""
    layout = Layout.from_mask(mask, (12, 8), **known)
    maps = [layout.kernel_map((3, 3), 1, (1, 1)), layout.kernel_map((2, 2), 2, (0, 0))]
    return (layout.tiles.index, layout.row_splits, layout.coordinates(), layout.tiles.mask(), *maps)


# What is known of a mask `(2, 3, 2)` that keeps 3 tiles in every image, and what is said where it does not.
KNOWN = pytest.mark.parametrize(
    ("known", "message"),
    [({"visible": 3}, "visible=3 tiles in every image"), ({"count": 6}, "count=6 tiles in all")],
    ids=["visible", "count"],
)
GEOMETRY_BACKENDS = pytest.mark.parametrize("backend", ["auto", pytest.param("cuda", marks=needs_cuda)])


@KNOWN
@GEOMETRY_BACKENDS
def test_what_is_known_leaves_no_shape_to_data(known: dict[str, int], message: str, backend: str) -> None:
    mask = draw_mask("equal counts", 2, (3, 2), seed=2).to(device_of(backend))
    with Recorder() as recorder, use_backend(backend):
        geometry(mask, **known)
    assert "aten::nonzero" not in recorder.names
    # In eager mode on the CPU, where reading a number costs nothing, what is said to be known is checked.
    assert recorder.names.count("aten::_local_scalar_dense") == (mask.device.type == "cpu")

    with Recorder() as recorder:
        geometry(mask.to("meta"), **known)
    assert not READS_DATA & set(recorder.names)

    with Recorder() as recorder:
        Layout.from_mask(mask.cpu(), (12, 8))
    assert "aten::nonzero" in recorder.names


@KNOWN
@GEOMETRY_BACKENDS
def test_what_is_known_compiles_to_one_graph_that_reads_nothing_back(
    known: dict[str, int], message: str, backend: str
) -> None:
    mask = draw_mask("equal counts", 2, (3, 2), seed=2).to(device_of(backend))
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
        with use_backend(backend):
            for found, wanted in zip(compiled(mask), expected, strict=True):
                assert torch.equal(found.cpu(), wanted)
            if mask.device.type == "cpu":  # on a GPU, the assertion that fails is the last thing a process does there
                with pytest.raises(RuntimeError, match=f"mask does not keep {re.sub('=[0-9]+', '', message)}"):
                    compiled(torch.zeros_like(mask))
    assert ran and not READS_DATA & set(ran)
    assert ("sparsecnx_cuda::tile_index" in ran) == ("sparsecnx_cuda::neighbour_table" in ran) == (backend == "cuda")


@pytest.mark.parametrize("known", ["visible", "count"])
@pytest.mark.parametrize(
    "backend", ["auto", pytest.param("cpu", marks=needs_cpu), pytest.param("cuda", marks=needs_cuda)]
)
def test_one_compilation_serves_every_batch_and_image_size(known: str, backend: str) -> None:
    """Geometry, gather, scatter and their gradients, where torch.compile leaves sizes open."""

    def run(images: Tensor, mask: Tensor, known_tiles: dict[str, int]) -> tuple[Tensor, ...]:
        x = SparseTensor.from_dense(images, mask, **known_tiles)
        return x.with_features(2 * x.features).dense(), x.layout.tiles.neighbours(1), x.layout.row_splits

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    device = device_of(backend)
    # No two sizes alike in the first call, which torch.compile would take for one size.
    for batch, grid in ((5, (3, 2)), (7, (3, 2)), (4, (3, 2)), (6, (7, 3))):
        mask = (torch.rand(batch, math.prod(grid)).argsort(1).argsort(1) >= 3).view(batch, *grid).to(device)
        images = torch.randn(batch, 9, *(4 * size for size in grid), device=device, requires_grad=True)
        tiles = {"visible": 3} if known == "visible" else {"count": 3 * batch}
        with use_backend(backend):
            found = compiled(images, mask, tiles)
        with use_backend("reference"):
            expected = run(images, mask, tiles)
        for value, wanted in zip(found, expected, strict=True):
            assert torch.equal(value, wanted)
        gradients = [torch.autograd.grad(out[0].sin().sum(), images)[0] for out in (found, expected)]
        assert_close(*gradients, 1e-6)
    assert counter.frame_count == 1


def visible_tiles(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `tile_index` gives for a mask `(B, cells)`, in plain torch."""
    tiles = TileSet.from_mask(mask, (mask.shape[1],))
    return tiles.index, tiles.splits, tiles.slots()


@needs_cuda
@given(st.data(), st.integers(1, 3))
def test_tile_index(data: st.DataObject, ndim: int) -> None:
    mask = data.draw(masks(ndim))[0].flatten(1)
    tiles, expected = TileSet.from_mask(mask, (mask.shape[1],)), visible_tiles(mask)
    for visible in {-1, -1 if tiles.visible is None else tiles.visible}:
        found = torch.ops.sparsecnx_cuda.tile_index(guarded(mask).to(DEVICE), tiles.count, visible)
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == wanted.dtype and torch.equal(value.cpu(), wanted)


@needs_cuda
@pytest.mark.parametrize(
    ("images", "cells"),
    [(0, 9), (1, 0), (3, 0), (1, 1), (700, 1), (300, 49), (2, 4096), (2, 4097), (3, 20_000), (1, 100_000)],
    ids=str,
)
@pytest.mark.parametrize("masked", [0.0, 0.6, 0.999, 1.0])
def test_tile_index_of_any_number_of_cells(images: int, cells: int, masked: float) -> None:
    mask = torch.rand(images, cells) < masked
    expected = visible_tiles(mask)
    found = torch.ops.sparsecnx_cuda.tile_index(mask.to(DEVICE), len(expected[0]), -1)
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value.cpu(), wanted)


@needs_cuda
@pytest.mark.parametrize(("images", "cells"), [(4, 7), (2, 5000)], ids=str)
def test_tile_index_of_a_mask_that_keeps_something_else(images: int, cells: int) -> None:
    mask = torch.rand(images, cells) < 0.5
    mask[0, 0], mask[-1, -1] = False, True  # at least one of each
    index, splits, slots = visible_tiles(mask)
    kept = len(index)
    for count in (0, kept - 1, kept + 1, images * cells):
        found_index, found_splits, found_slots = (
            value.cpu() for value in torch.ops.sparsecnx_cuda.tile_index(mask.to(DEVICE), count, -1)
        )
        shorter = min(count, kept)
        assert found_splits[-1] == -1
        assert torch.equal(found_splits[:-1], splits[:-1].clamp(max=count))
        assert torch.equal(found_index[:shorter], index[:shorter]) and not found_index[shorter:].any()
        assert torch.equal(found_slots, torch.where(slots < count, slots, -1))


@needs_cuda
def test_tile_index_counts_every_image() -> None:
    mask = torch.tensor([[False, True, True], [False, False, False]])
    for visible, end in ((2, -1), (-1, 4)):
        assert torch.ops.sparsecnx_cuda.tile_index(mask.to(DEVICE), 4, visible)[1].tolist() == [0, 1, end]


@needs_cuda
@given(st.data(), st.integers(1, 3), st.integers(0, 3))
def test_neighbour_table(data: st.DataObject, ndim: int, radius: int) -> None:
    mask, _ = data.draw(masks(ndim))
    tiles = TileSet.from_mask(mask, tuple(mask.shape[1:]))
    index, slots = guarded(tiles.index).to(DEVICE), guarded(tiles.slots()).to(DEVICE)
    found = torch.ops.sparsecnx_cuda.neighbour_table(index, slots, tiles.grid, radius)
    assert found.dtype == torch.int32 and torch.equal(found.cpu(), tiles.neighbours(radius))


@needs_cuda
def test_geometry_operators_pass_opcheck() -> None:
    mask = draw_mask("equal counts", 3, (3, 4), seed=4).flatten(1).to(DEVICE)
    tiles = TileSet.from_mask(mask, (3, 4))
    torch.library.opcheck(torch.ops.sparsecnx_cuda.tile_index.default, (mask, tiles.count, tiles.visible))
    torch.library.opcheck(torch.ops.sparsecnx_cuda.tile_index.default, (mask, tiles.count, -1))
    arguments = (tiles.index, tiles.slots(), [3, 4], 2)
    torch.library.opcheck(torch.ops.sparsecnx_cuda.neighbour_table.default, arguments)


@needs_cuda
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gpu_operators_build_the_same_geometry(kind: str, ndim: int) -> None:
    mask = draw_mask(kind, 3, (3, 2, 4)[:ndim], seed=7)
    with use_backend("reference"):
        expected = TileSet.from_mask(mask, tuple(mask.shape[1:]))
        with Recorder() as recorder:
            neighbours = expected.neighbours(2)
    assert not [name for name in recorder.names if name.startswith("sparsecnx")]
    known = {"visible": expected.visible} if kind == "equal counts" else {"count": expected.count}
    with use_backend("cuda"):
        counted = TileSet.from_mask(mask.to(DEVICE), expected.grid)
        assert counted.visible == expected.visible
        with Recorder() as recorder:
            told = TileSet.from_mask(mask.to(DEVICE), expected.grid, **known)
        assert recorder.names.count("sparsecnx_cuda::tile_index") == 1 and "aten::sort" not in recorder.names
        for tiles in (counted, told):
            with Recorder() as recorder:
                slots = tiles.slots()
                table = tiles.neighbours(2)
            assert recorder.names == ["sparsecnx_cuda::neighbour_table"]
            for found, wanted in (
                (tiles.index, expected.index),
                (tiles.splits, expected.splits),
                (slots, expected.slots()),
                (table, neighbours),
            ):
                assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize(("measured", "by_auto"), [("cuda", True), ("triton", False)])
def test_who_builds_the_geometry_on_a_gpu(
    measured: Literal["cuda", "triton"], by_auto: bool, ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU operators where they are asked for, and for `auto` where they were measured to be faster."""
    asked = []

    def compare(*arguments: object) -> Comparison:
        asked.append(arguments)
        return Comparison(measured, True, "")

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(layout, "compare", compare)
    monkeypatch.setattr(layout._cuda, "refusal", lambda device: None)
    for backend in ("reference", "cpu", "triton", "minkowski"):
        with use_backend(backend):
            assert not layout._takes_cuda(gpu, ndim)
    with use_backend("cuda"):
        assert layout._takes_cuda(gpu, ndim) == (ndim <= 3)
    assert not asked
    assert not layout._takes_cuda(torch.device("cpu"), ndim)
    assert layout._takes_cuda(gpu, ndim) == (by_auto and ndim <= 3)
    assert asked == ([(("geometry",), gpu, torch.float32, 1)] if ndim <= 3 else [])
    monkeypatch.setattr(layout._cuda, "refusal", lambda device: "not here")
    with use_backend("cuda"):
        assert not layout._takes_cuda(gpu, ndim)


@needs_cuda
def test_slots_are_ordinary_tensors_also_under_inference_mode() -> None:
    mask = draw_mask("random counts", 2, (3, 2), seed=1).to(DEVICE)
    with use_backend("cuda"), torch.inference_mode():
        slots = TileSet.from_mask(mask, (3, 2)).slots()
    assert not slots.is_inference()


@needs_cuda
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the emulator counts launches")
def test_geometry_takes_three_launches() -> None:
    emulator, mask = cuda_emulator.load(), draw_mask("random counts", 2, (3, 2), seed=1)
    emulator.forget_launches()
    with use_backend("cuda"):
        TileSet.from_mask(mask, (3, 2), count=int((~mask).sum())).neighbours(1)
    names = [launch.kernel for launch in emulator.launches()]
    assert len(names) == 3
    for name, kernel in zip(names, ("count_kernel", "place_kernel", "neighbour_table_kernel"), strict=True):
        assert kernel in name


MASK, PLACES = FLAT.to(DEVICE), torch.tensor([0, 4], device=DEVICE)
SLOTS = torch.tensor([0, -1, -1, -1, 1, -1], dtype=torch.int32, device=DEVICE)


@needs_cuda
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.tile_index(MASK.int(), 1, -1), "mask is Int, expected Bool"),
        (lambda op: op.tile_index(MASK[0], 1, -1), r"mask must be contiguous, \(images, cells\)"),
        (lambda op: op.tile_index(MASK.t(), 1, -1), r"mask must be contiguous, \(images, cells\)"),
        (lambda op: op.tile_index(MASK, 13, -1), "count is 13, expected 0 to 12"),
        (lambda op: op.tile_index(MASK, -1, -1), "count is -1, expected 0 to 12"),
        (lambda op: op.tile_index(MASK, 5, 2), "visible is 2, expected -1 or count / images, count is 5"),
        (lambda op: op.tile_index(MASK, 14, 7), "count is 14, expected 0 to 12"),
        (lambda op: op.neighbour_table(PLACES[None], SLOTS, [2, 3], 1), r"index must be \(tiles,\)"),
        (lambda op: op.neighbour_table(PLACES.int(), SLOTS, [2, 3], 1), "index is Int, expected Long"),
        (lambda op: op.neighbour_table(PLACES, SLOTS.long(), [2, 3], 1), "slots is Long, expected Int"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [2, 2], 1), "slots has 6 elements, expected one for each of 4"),
        (lambda op: op.neighbour_table(PLACES.repeat(4), SLOTS, [2, 3], 1), "index has 8 tiles, slots has 6 cells"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [], 1), "grid has 0 axes, expected 1 to 3"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [1, 1, 2, 3], 1), "grid has 4 axes, expected 1 to 3"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [0, 3], 1), "grid has 0 tiles along axis 0"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [2, 3], -1), "radius is -1, expected 0 or more"),
        (lambda op: op.neighbour_table(PLACES, SLOTS, [2, 3], 3000), "radius is 3000, expected at most"),
    ],
)
def test_geometry_operators_refuse(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.sparsecnx_cuda)
