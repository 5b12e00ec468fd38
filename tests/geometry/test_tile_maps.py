"""Compare kernel maps and their inverses with dense convolutions of images of row numbers."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cases import MASKS, draw_mask, example_layout, make_layout, needs_cpu, random_sparse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparsecnx import Layout, SparseTensor, TileSet
from sparsecnx.backends import compiled
from sparsecnx.geometry.kernel_map import invert_kernel_map
from sparsecnx.geometry.packing import gather_rows, scatter_rows

CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BUILT_BY = pytest.mark.parametrize(
    "without",
    [pytest.param(nullcontext(), marks=needs_cpu), patch.object(compiled, "loaded", False)],
    ids=["C++", "torch"],
)


@st.composite
def windows(draw: Any) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """Draw a layout in one to three dimensions, its sides different, and a convolution on it."""
    ndim = draw(st.integers(1, 3))
    tile = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8][: (6, 6, 4)[ndim - 1]])] * ndim))
    grid = draw(st.tuples(*[st.integers(1, (6, 4, 3)[ndim - 1])] * ndim))
    mask = draw_mask(draw(st.sampled_from(MASKS)), draw(st.integers(1, 3)), grid, draw(st.integers(0, 999)))
    kernel = draw(st.tuples(*[st.integers(1, (7, 5, 3)[ndim - 1])] * ndim))
    window = {
        "kernel": kernel,
        "stride": tuple(draw(st.sampled_from([s for s in range(1, side + 1) if side % s == 0])) for side in tile),
        "padding": draw(st.tuples(*[st.integers(-2, 9)] * ndim)),
        "dilation": draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, 7])] * ndim)),
    }
    return Layout(TileSet.from_mask(mask, grid), tile), window


def convolved_rows(layout: Layout, window: dict[str, tuple[int, ...]]) -> Tensor:
    """Return the map by dense convolutions, one for each tap, of an image that holds 1 + row at visible sites."""
    numbers = torch.arange(1.0, layout.rows + 1, dtype=torch.float64)[:, None]
    image = scatter_rows(numbers, layout, numbers.new_zeros(1))
    out = layout.coarsen(window["stride"])
    for axis, (size, wanted, k, s, p, d) in enumerate(zip(layout.shape, out.shape, *window.values(), strict=True)):
        extent = (wanted - 1) * s + (k - 1) * d + 1  # It begins p sites before the image.
        around = [0] * (2 * layout.ndim)
        around[-2 - 2 * axis], around[-1 - 2 * axis] = max(0, p), max(0, extent - p - size)
        image = F.pad(image, around).narrow(2 + axis, max(0, -p), extent)
    taps = torch.eye(math.prod(window["kernel"]), dtype=torch.float64).view(-1, 1, *window["kernel"])
    read = CONV[layout.ndim](image, taps, stride=window["stride"], dilation=window["dilation"])
    return gather_rows(read, out).to(torch.int32) - 1


@BUILT_BY
@given(windows())
def test_maps_are_those_of_dense_convolutions(without: Any, drawn: tuple[Layout, dict[str, tuple[int, ...]]]) -> None:
    layout, window = drawn
    with without:
        table, inverse = layout.kernel_map(**window), layout.inverse_map(**window)
    assert table.dtype == inverse.dtype == torch.int32 and table.is_contiguous() and inverse.is_contiguous()
    assert torch.equal(table, convolved_rows(layout, window))
    assert torch.equal(inverse, invert_kernel_map(table, layout.rows))
    assert layout.kernel_map(**window) is table and layout.inverse_map(**window) is inverse


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_kernel_map_reaches_beyond_the_next_tile(size: int, tile: int) -> None:
    layout = example_layout(batch=2, grid=(5, 4), tile=tile)
    rows = {tuple(site): row for row, site in enumerate(layout.coordinates().tolist())}
    padding = size // 2
    table = layout.kernel_map((size, size), (1, 1), (padding, padding), (1, 1)).tolist()
    for (image, y, x), found in zip(rows, table, strict=True):
        taps = itertools.product(range(-padding, size - padding), repeat=2)
        assert found == [rows.get((image, y + dy, x + dx), -1) for dy, dx in taps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (4, 2)}, r"stride is \(4, 2\): it must divide the tile side, 6 sites"),
        ({"stride": (2,)}, r"stride is \(2,\): expected a number for each of 2 axes"),
        ({"kernel": (3, 3, 3)}, r"kernel is \(3, 3, 3\): expected a number for each of 2 axes"),
        ({"dilation": ()}, r"dilation is \(\): expected a number for each of 2 axes"),
    ],
)
def test_maps_refuse_what_does_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)} | change
    for build in (example_layout(tile=6).kernel_map, example_layout(tile=6).inverse_map):
        with pytest.raises(ValueError, match=message):
            build(**window)


def test_torch_vmap_gives_each_sample_the_maps_of_its_mask() -> None:
    masks = torch.stack([draw_mask("equal counts", 2, (3, 2), seed=seed + 6 * seed) for seed in (1, 1, 1)])
    masks[1], masks[2] = masks[1].roll(1, 1), masks[2].roll(1, 2)
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 0), "dilation": (1, 1)}

    def run(mask: Tensor) -> tuple[Tensor, Tensor]:
        layout = Layout(TileSet.from_mask(mask, (3, 2), visible=2), (4, 2))
        return layout.kernel_map(**window), layout.inverse_map(**window)

    found = torch.vmap(run)(masks)
    for sample, mask in enumerate(masks):
        assert all(torch.equal(both[sample], alone) for both, alone in zip(found, run(mask), strict=True))


def test_maps_of_counts_that_are_not_known_compile_in_one_graph() -> None:
    window = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}

    def run(x: SparseTensor) -> tuple[Tensor, Tensor]:
        return x.layout.kernel_map(**window), x.layout.inverse_map(**window)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled_run = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for seed in (1, 2, 3):
        layout = make_layout(draw_mask("random counts", 3, (3, 4), seed), (4, 2))
        assert layout.tiles.visible is None
        found, expected = compiled_run(random_sparse(layout, 1)), run(random_sparse(layout, 1))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert counter.frame_count == 1
