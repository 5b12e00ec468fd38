"""Gather and scatter by Triton kernels, and the choice among the ways to pack."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import (
    DEVICE,
    MASKS,
    TILES,
    draw_mask,
    make_layout,
    move,
    name,
    needs_native,
    needs_triton,
    random_sparse,
    site_mask,
)
from test_tensor import MEMORY, channels_last, numbered, rows_by_coordinates
from torch import Tensor

from sparsecnx import Layout, _extension, _triton, packing, use_backend
from sparsecnx.packing import gather_rows, scatter_rows

ALL_TILES = (*TILES, 24, 32)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """An element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layout_on_device(kind: str, grid: tuple[int, int], tile: int) -> Layout:
    return move(random_sparse(make_layout(draw_mask(kind, 2, grid, seed=4), tile), 1), DEVICE).layout


def numbered_images(layout: Layout, channels: int, dtype: torch.dtype) -> Tensor:
    """A dense tensor on the device, NaN at the masked sites."""
    here = make_layout(layout.tiles.mask().view(-1, *layout.tiles.grid).cpu(), layout.tile)
    return numbered(here, channels, dtype).to(DEVICE)


def round_trip(layout: Layout, images: Tensor, fill: float) -> None:
    """Gathering and scattering by Triton give what is visible, and `fill` where nothing is."""
    with use_backend("triton"):
        rows = gather_rows(images, layout)
        dense = scatter_rows(rows, layout, rows.new_full((images.shape[1],), fill))
    assert torch.equal(rows, rows_by_coordinates(images, layout))
    masked = site_mask(layout) == 0
    assert dense.is_contiguous() and torch.equal(dense, images.masked_fill(masked, fill))


@needs_triton
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tile", ALL_TILES)
def test_every_tile(tile, kind):
    layout = layout_on_device(kind, (3, 2) if tile < 12 else (1, 2), tile)
    round_trip(layout, numbered_images(layout, 3, torch.float32), fill=7.0)


@needs_triton
@DTYPES
@pytest.mark.parametrize("channels", [1, 3, 20, 40, 130])
@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory(memory, channels, dtype):
    layout = layout_on_device("random counts", (2, 3), 3)
    round_trip(layout, memory(numbered_images(layout, channels, dtype)), fill=0.0)


@needs_triton
def test_many_channels():
    layout = layout_on_device("random counts", (2, 2), 1)
    round_trip(layout, numbered_images(layout, 2816, torch.bfloat16), fill=1.0)


@needs_triton
@pytest.mark.parametrize("memory", [torch.clone, channels_last, lambda x: x[:, :1, :1, :1].expand_as(x)])
@pytest.mark.parametrize("tile", [1, 3, 8])
def test_gradients_are_those_of_the_reference(tile, memory):
    """Each of the two is the other's adjoint, whatever the strides of the incoming gradient."""
    layout = layout_on_device("an empty and a full image", (3, 2), tile)
    dense = torch.randn(layout.batch, 5, *layout.shape, device=DEVICE)
    rows, fill = torch.randn(layout.rows, 5, device=DEVICE), torch.randn(5, device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            leaf = dense.clone().requires_grad_()
            (grad_dense,) = torch.autograd.grad(gather_rows(leaf, layout), leaf, rows)
            leaves = [rows.clone().requires_grad_(), fill.clone().requires_grad_()]
            grad_rows, grad_fill = torch.autograd.grad(
                scatter_rows(leaves[0], layout, leaves[1]), leaves, memory(dense)
            )
        found.append((grad_dense, grad_rows, grad_fill))
    (grad_dense, grad_rows, grad_fill), expected = found
    assert torch.equal(grad_dense, expected[0]) and torch.equal(grad_rows, expected[1])
    torch.testing.assert_close(grad_fill, expected[2])


@needs_triton
def test_the_gradient_of_the_fill_is_that_of_masked_sites_alone():
    """What is visible may be infinite."""
    layout = layout_on_device("random counts", (2, 3), 4)
    fill = torch.zeros(2, device=DEVICE, requires_grad=True)
    incoming = torch.ones(2, 2, *layout.shape, device=DEVICE).masked_fill(site_mask(layout) == 1, torch.inf)
    with use_backend("triton"):
        dense = scatter_rows(torch.randn(layout.rows, 2, device=DEVICE), layout, fill)
        (gradient,) = torch.autograd.grad(dense, fill, incoming)
    masked = layout.batch * 8 * 12 - layout.rows
    assert gradient.tolist() == [masked, masked] and masked > 0


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_slots(kind, ndim):
    tiles = make_layout(draw_mask(kind, 2, (3, 2, 2)[:ndim], seed=3), 2).tiles
    slots = tiles.slots()
    assert slots.dtype == torch.int32 and slots.shape == (tiles.mask().numel(),)
    assert torch.equal(slots[tiles.index], torch.arange(tiles.count, dtype=torch.int32))
    assert torch.equal(slots < 0, tiles.mask().flatten())
    assert tiles.slots() is slots


def room(backend: str, dtype: torch.dtype = torch.float32, grid: tuple[int, ...] = (2, 2)) -> object:
    """The module that packs such a tensor."""
    layout = make_layout(draw_mask("random counts", 2, grid, seed=0), 2)
    with use_backend(backend):
        return packing._room(torch.zeros(1, dtype=dtype), layout)


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@needs_native
def test_on_the_cpu_compiled_kernels_pack(backend):
    assert room(backend) is (packing.reference if backend == "reference" else packing.native)


@pytest.mark.parametrize("backend", ["auto", "native", "triton"])
def test_volumes_and_lines_are_packed_by_the_reference(backend):
    assert room(backend, grid=(2, 2, 2)) is packing.reference
    assert room(backend, grid=(3,)) is packing.reference


@pytest.mark.skipif(not (_triton.available and _triton.interpreting), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64], ids=name)
def test_triton_packs_on_the_cpu_when_asked(dtype):
    takes = dtype in (torch.float32, torch.bfloat16, torch.float16)
    otherwise = packing.native if _extension.loaded else packing.reference
    assert room("triton", dtype) is (packing.triton if takes else otherwise)
