"""Gather and scatter by Triton and CUDA kernels, and the choice among the ways to pack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    needs_cuda,
    needs_cpu,
    needs_triton,
    random_sparse,
    site_mask,
)
from test_tensor import MEMORY, channels_last, numbered, rows_by_coordinates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import Layout, packing, use_backend
from sparsecnx.backends import compiled, cuda, triton_launch
from sparsecnx.choices import Comparison
from sparsecnx.geometry.packing import gather_rows, scatter_rows

ALL_TILES = (*TILES, 24, 32)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
GPU_BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_cuda)]
)


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


def round_trip(backend: str, layout: Layout, images: Tensor, fill: float) -> None:
    """Gathering and scattering give what is visible, and `fill` where nothing is."""
    with use_backend(backend):
        assert packing._room(images, layout) is {"triton": packing.triton, "cuda": packing.cuda}[backend]
        rows = gather_rows(images, layout)
        dense = scatter_rows(rows, layout, rows.new_full((images.shape[1],), fill))
    assert torch.equal(rows, rows_by_coordinates(images, layout))
    masked = site_mask(layout) == 0
    assert dense.is_contiguous() and torch.equal(dense, images.masked_fill(masked, fill))


@GPU_BACKENDS
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tile", ALL_TILES)
def test_every_tile(tile, kind, backend):
    layout = layout_on_device(kind, (3, 2) if tile < 12 else (1, 2), tile)
    round_trip(backend, layout, numbered_images(layout, 3, torch.float32), fill=7.0)


@GPU_BACKENDS
@DTYPES
@pytest.mark.parametrize("channels", [1, 3, 20, 40, 130])
@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory(memory, channels, dtype, backend):
    layout = layout_on_device("random counts", (2, 3), 3)
    round_trip(backend, layout, memory(numbered_images(layout, channels, dtype)), fill=0.0)


@GPU_BACKENDS
def test_many_channels(backend):
    layout = layout_on_device("random counts", (2, 2), 1)
    round_trip(backend, layout, numbered_images(layout, 2816, torch.bfloat16), fill=1.0)


@GPU_BACKENDS
@pytest.mark.parametrize("memory", [torch.clone, channels_last, lambda x: x[:, :1, :1, :1].expand_as(x)])
@pytest.mark.parametrize("tile", [1, 3, 8])
def test_gradients_are_those_of_the_reference(tile, memory, backend):
    """Each of the two is the other's adjoint, whatever the strides of the incoming gradient."""
    layout = layout_on_device("an empty and a full image", (3, 2), tile)
    dense = torch.randn(layout.batch, 5, *layout.shape, device=DEVICE)
    rows, fill = torch.randn(layout.rows, 5, device=DEVICE), torch.randn(5, device=DEVICE)
    found = []
    for room in (backend, "reference"):
        with use_backend(room):
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


@GPU_BACKENDS
def test_the_gradient_of_the_fill_is_that_of_masked_sites_alone(backend):
    """What is visible may be infinite."""
    layout = layout_on_device("random counts", (2, 3), 4)
    fill = torch.zeros(2, device=DEVICE, requires_grad=True)
    incoming = torch.ones(2, 2, *layout.shape, device=DEVICE).masked_fill(site_mask(layout) == 1, torch.inf)
    with use_backend(backend):
        dense = scatter_rows(torch.randn(layout.rows, 2, device=DEVICE), layout, fill)
        (gradient,) = torch.autograd.grad(dense, fill, incoming)
    masked = layout.batch * 8 * 12 - layout.rows
    assert gradient.tolist() == [masked, masked] and masked > 0


class Operators(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@needs_cuda
@needs_triton
@pytest.mark.parametrize("triton", ["takes it", "does not"])
def test_the_gradient_of_the_fill_is_tritons_where_cuda_packs(triton, monkeypatch):
    """It has no kernel in CUDA, and torch's operators write copies as large as the incoming gradient."""
    layout = layout_on_device("random counts", (2, 3), 4)
    if triton == "does not":
        monkeypatch.setattr(triton_launch, "refusal", lambda device: "not here")
    fill = torch.zeros(3, device=DEVICE, requires_grad=True)
    incoming = torch.randn(2, 3, *layout.shape, device=DEVICE)
    with use_backend("cuda"):
        dense = scatter_rows(torch.randn(layout.rows, 3, device=DEVICE), layout, fill)
    with Operators() as operators:
        (gradient,) = torch.autograd.grad(dense, fill, incoming)
    assert ("sparsecnx_triton::scatter_tiles_fill_grad" in operators.names) == (triton == "takes it")
    assert ("aten::where.self" in operators.names) == (triton == "does not")
    expected = incoming.masked_fill(site_mask(layout).to(DEVICE) == 1, 0).sum((0, 2, 3))
    torch.testing.assert_close(gradient, expected)


@needs_cuda
@pytest.mark.parametrize("memory", [torch.clone, channels_last, lambda x: x.repeat_interleave(2, dim=-1)[..., ::2]])
@pytest.mark.parametrize("tile", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64], ids=name)
def test_cuda_moves_values_of_any_size(dtype, tile, memory):
    """In pieces of as many sites as tile and size allow, of rows that are whole accesses of 16 bytes or not."""
    layout = layout_on_device("random counts", (2, 3), tile)
    for channels in (3, 16 // dtype.itemsize, 16, 144):
        images = torch.randint(2 if dtype == torch.bool else 100, (2, channels, *layout.shape), device=DEVICE).to(dtype)
        fill = torch.ones(channels, dtype=dtype, device=DEVICE)
        with use_backend("cuda"):
            rows = gather_rows(memory(images), layout)
            dense = scatter_rows(rows, layout, fill)
        assert torch.equal(rows, rows_by_coordinates(images, layout))
        assert torch.equal(dense, images.masked_fill(site_mask(layout).to(DEVICE) == 0, 1))


@needs_cuda
@pytest.mark.parametrize("channels", [3, 16, 200])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_cuda_takes_tensors_from_the_middle_of_memory(offset, channels):
    """Which no longer begin at a multiple of 16 bytes."""
    layout = layout_on_device("random counts", (2, 2), 8)
    images = numbered_images(layout, channels, torch.bfloat16)
    rows = rows_by_coordinates(images, layout)

    def shifted(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(offset), value.flatten()])[offset:].view(value.shape)

    with use_backend("cuda"):
        assert torch.equal(gather_rows(shifted(images), layout), rows)
        moved = channels_last(images).permute(0, 2, 3, 1).contiguous()
        assert torch.equal(gather_rows(shifted(moved).permute(0, 3, 1, 2), layout), rows)
        dense = scatter_rows(shifted(rows), layout, shifted(rows.new_zeros(channels)))
    assert torch.equal(dense, images.nan_to_num())


@needs_cuda
def test_cuda_operators_pass_opcheck():
    layout = layout_on_device("random counts", (2, 2), 2)
    tables = layout.tiles.index, layout.tiles.slots()
    dense = torch.randn(2, 3, *layout.shape, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsecnx_cuda.gather_tiles.default, (dense, *tables, 2))
    rows = torch.randn(layout.rows, 3, device=DEVICE, requires_grad=True)
    fill = torch.randn(3, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsecnx_cuda.scatter_tiles.default, (rows, fill, *tables, 2, *layout.shape, 2))


@needs_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 3}, "tile is 3, expected a divisor of 8 and 4"),
        ({"index": torch.zeros(1, dtype=torch.int32)}, "index is Int, expected Long"),
        ({"slots": torch.zeros(5, dtype=torch.int32)}, "slots has 5 elements, expected 4"),
        ({"slots": torch.zeros(4)}, "slots is Float, expected Int"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, "index has 5 tiles, expected at most 4"),
    ],
    ids=str,
)
def test_cuda_refuses_another_geometry(change, message):
    arguments = {"index": torch.zeros(2, dtype=torch.int64), "slots": torch.zeros(4, dtype=torch.int32), "tile": 4}
    arguments |= change
    index, slots = arguments["index"].to(DEVICE), arguments["slots"].to(DEVICE)
    images = torch.zeros(2, 1, 8, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.gather_tiles(images, index, slots, arguments["tile"])
    rows = torch.zeros(index.shape[0] * arguments["tile"] ** 2, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.scatter_tiles(rows, rows.new_zeros(1), index, slots, 2, 8, 4, arguments["tile"])


@needs_cuda
def test_cuda_refuses_rows_that_are_not_those_of_the_tiles():
    index, slots = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(31, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match="rows has 31 rows, expected 32"):
        torch.ops.sparsecnx_cuda.scatter_tiles(rows, rows.new_zeros(1), index, slots, 2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="fill has 2 elements, expected 1"):
        torch.ops.sparsecnx_cuda.scatter_tiles(
            torch.zeros(32, 1, device=DEVICE), rows.new_zeros(2), index, slots, 2, 8, 4, 4
        )


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_slots(kind, ndim):
    tiles = make_layout(draw_mask(kind, 2, (3, 2, 2)[:ndim], seed=3), 2).tiles
    slots = tiles.slots()
    assert slots.dtype == torch.int32 and slots.shape == (tiles.mask().numel(),)
    assert torch.equal(slots[tiles.index], torch.arange(tiles.count, dtype=torch.int32))
    assert torch.equal(slots < 0, tiles.mask().flatten())
    assert tiles.slots() is slots


def room(backend: str, dtype: torch.dtype = torch.float32, grid: tuple[int, ...] = (2, 2), channels: int = 1) -> object:
    """The module that packs such a tensor."""
    layout = make_layout(draw_mask("random counts", 2, grid, seed=0), 2)
    with use_backend(backend):
        return packing._room(torch.zeros(1, channels, dtype=dtype), layout)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@needs_cpu
def test_on_the_cpu_compiled_kernels_pack(backend):
    assert room(backend) is (packing.reference if backend == "reference" else packing.native)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", pytest.param("cuda", marks=needs_cuda)])
def test_volumes_and_lines_are_packed_by_the_reference(backend):
    assert room(backend, grid=(2, 2, 2)) is packing.reference
    assert room(backend, grid=(3,)) is packing.reference


@pytest.mark.skipif(not (triton_launch.available and triton_launch.interpreting), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64], ids=name)
def test_triton_packs_on_the_cpu_when_asked(dtype):
    takes = dtype in (torch.float32, torch.bfloat16, torch.float16)
    otherwise = packing.native if compiled.loaded else packing.reference
    assert room("triton", dtype) is (packing.triton if takes else otherwise)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8], ids=name)
def test_cuda_packs_when_asked(dtype):
    if DEVICE.type == "cpu":
        assert room("cuda", dtype) is packing.cuda
        assert room("auto", dtype) is packing.native
        otherwise = packing.native
    else:
        otherwise = packing.reference
    assert room("cuda", torch.complex128) is otherwise
    assert room("cuda", dtype, channels=0) is otherwise


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("measured", "expected"), [("cuda", "cuda"), ("triton", "triton")])
def test_measurements_decide_on_a_gpu(measured, expected, monkeypatch):
    """Where both can, and neither was asked for; what Triton does not take is CUDA's."""
    asked = []

    def compare(*arguments: object) -> Comparison:
        asked.append(arguments)
        return Comparison(measured, True, "")

    class OnGpu:
        device, shape = torch.device("cuda"), (2, 40)

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    layout = make_layout(draw_mask("random counts", 2, (2, 2), seed=0), 2)
    monkeypatch.setattr(packing, "compare", compare)
    for room in (cuda, triton_launch):
        monkeypatch.setattr(room, "refusal", lambda device: None)
    assert packing._room(OnGpu(torch.float32), layout) is getattr(packing, expected)
    steps = ("gather_tiles", "scatter_tiles")
    assert asked == [(steps, torch.device("cuda"), torch.float32, 40, 2)]
    assert packing._room(OnGpu(torch.float64), layout) is packing.cuda
    for backend in ("triton", "cuda"):
        with use_backend(backend):
            assert packing._room(OnGpu(torch.float32), layout) is getattr(packing, backend)
    assert len(asked) == 1
