"""Compare gather and scatter on every backend with indexing by coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import (
    DEVICE,
    MASKS,
    TILES,
    backends,
    device_of,
    draw_mask,
    example_layout,
    make_layout,
    move,
    name,
    needs_cpu,
    needs_triton,
    random_sparse,
    site_mask,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecnx import Layout, SparseTensor, use_backend
from sparsecnx.backends import compiled, triton_launch
from sparsecnx.geometry.packing import Packing, gather_operator, gather_rows, scatter_operator, scatter_rows

GRIDS = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}
EVERY = pytest.mark.parametrize("backend", backends("gather_rows"))
COMPILED = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
)
IN_FLOAT64 = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


MEMORY: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    channels_last,
    lambda x: x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=0)[::2, ..., ::2],
    lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    lambda x: torch.cat([x, x])[x.shape[0] :],
    lambda x: x[:, :1].expand_as(x),
    lambda x: x.transpose(-1, 2).contiguous().transpose(-1, 2),
]


def layout_of(kind: str, grid: tuple[int, ...], tile: int | tuple[int, ...], backend: str) -> Layout:
    return move(random_sparse(make_layout(draw_mask(kind, 2, grid, seed=4), tile), 1), device_of(backend)).layout


def numbered(layout: Layout, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a dense tensor with NaN at the masked sites, which shows where a kernel reads one."""
    images = torch.randn(layout.batch, channels, *layout.shape).to(layout.device, dtype)
    return images.masked_fill(site_mask(layout) == 0, torch.nan)


def rows_by_coordinates(dense: Tensor, layout: Layout) -> Tensor:
    """Return the rows, found one site at a time."""
    image, *place = layout.coordinates().long().unbind(1)
    return dense[(image, slice(None), *place)]


def round_trip(backend: str, layout: Layout, images: Tensor, fill: float) -> None:
    """Assert that gather and scatter return the visible sites, and `fill` elsewhere."""
    with use_backend(backend):
        assert gather_operator.choose(Packing(images, layout)) == backend
        rows = gather_rows(images, layout)
        dense = scatter_rows(rows, layout, rows.new_full((images.shape[1],), fill))
        # These rows are not contiguous.
        sliced = scatter_rows(torch.cat([rows] * 2, dim=1)[:, images.shape[1] :], layout, rows.new_zeros(rows.shape[1]))
    assert torch.equal(rows, rows_by_coordinates(images, layout))
    masked = site_mask(layout) == 0
    assert torch.equal(dense, images.masked_fill(masked, fill))
    assert torch.equal(sliced, images.masked_fill(masked, 0))


@EVERY
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tile", [*TILES, 24, 32])
def test_every_tile(tile: int, kind: str, backend: str) -> None:
    layout = layout_of(kind, (3, 2) if tile < 12 else (1, 2), tile, backend)
    round_trip(backend, layout, numbered(layout, 3), fill=7.0)


@EVERY
@given(st.data(), st.sampled_from(MEMORY), st.sampled_from([1, 3, 20, 40, 130]))
def test_any_memory_and_dtype(
    backend: str, data: st.DataObject, memory: Callable[[Tensor], Tensor], channels: int
) -> None:
    floating = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend != "triton")
    dtype, ndim = data.draw(st.sampled_from(floating)), data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, 4 - ndim // 2)] * ndim))
    tile = data.draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 12][: 9 - 2 * ndim])] * ndim))
    mask = draw_mask(
        data.draw(st.sampled_from(MASKS)), data.draw(st.integers(1, 3)), grid, data.draw(st.integers(0, 99))
    )
    layout = move(random_sparse(make_layout(mask, tile), 1), device_of(backend)).layout
    round_trip(backend, layout, memory(numbered(layout, channels, dtype)), fill=0.0)


@needs_triton
def test_many_channels() -> None:
    layout = layout_of("random counts", (2, 2), 1, "triton")
    round_trip("triton", layout, numbered(layout, 2816, torch.bfloat16), fill=1.0)


@COMPILED
@pytest.mark.parametrize("memory", [torch.clone, channels_last, lambda x: x[:, :1, :1, :1].expand_as(x)])
@pytest.mark.parametrize("tile", [1, (6, 4), 8], ids=name)
def test_gradients_are_those_of_the_reference(
    tile: int | tuple[int, ...], memory: Callable[[Tensor], Tensor], backend: str
) -> None:
    """Gather and scatter are adjoint, whatever the strides of the incoming gradient."""
    layout = layout_of("an empty and a full image", (3, 2), tile, backend)
    dense = torch.randn(layout.batch, 5, *layout.shape, device=layout.device)
    rows, fill = torch.randn(layout.rows, 5, device=layout.device), torch.randn(5, device=layout.device)
    found = []
    for asked in (backend, "reference"):
        with use_backend(asked):
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


@EVERY
def test_the_gradient_of_the_fill_is_that_of_masked_sites_alone(backend: str) -> None:
    """Visible sites may be infinite."""
    layout = layout_of("random counts", (2, 3), 4, backend)
    fill = torch.zeros(2, device=layout.device, requires_grad=True)
    incoming = torch.ones(2, 2, *layout.shape, device=layout.device)
    incoming = incoming.masked_fill(site_mask(layout) == 1, torch.inf)
    with use_backend(backend):
        dense = scatter_rows(torch.randn(layout.rows, 2, device=layout.device), layout, fill)
        (gradient,) = torch.autograd.grad(dense, fill, incoming)
    masked = layout.batch * 8 * 12 - layout.rows
    assert gradient.tolist() == [masked, masked] and masked > 0


@IN_FLOAT64
@pytest.mark.parametrize("ndim", GRIDS)
@pytest.mark.parametrize("kind", MASKS)
def test_fill_and_its_gradient(backend: str, kind: str, ndim: int) -> None:
    layout = make_layout(draw_mask(kind, 2, GRIDS[ndim], seed=4), 2)
    x, keep = random_sparse(layout, 3), site_mask(layout)
    token = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    features = x.features.requires_grad_()
    with use_backend(backend):
        assert torch.equal(x.dense(-2.5), x.dense() - 2.5 * (1 - keep))
        dense = x.dense(token)
        shaped = token.detach().view(1, 3, *([1] * ndim))
        assert torch.equal(dense, x.dense() + shaped * (1 - keep))
        incoming = torch.randn_like(dense)
        grad_features, grad_token = torch.autograd.grad(dense, [features, token], incoming)
    assert torch.equal(grad_features, rows_by_coordinates(incoming, layout))
    sums = (incoming * (1 - keep)).movedim(1, 0).flatten(1).sum(1)
    torch.testing.assert_close(grad_token, sums, rtol=0, atol=1e-12)


@EVERY
def test_fill_takes_the_dtype_of_the_features(backend: str) -> None:
    x = move(random_sparse(example_layout(), 2, torch.bfloat16), device_of(backend))
    token = torch.tensor([1.0, 2.0], requires_grad=True, device=x.device)
    with use_backend(backend):
        dense = x.dense(token)
    assert dense.dtype == torch.bfloat16
    dense.sum().backward()
    assert token.grad is not None and token.grad.dtype == torch.float32
    masked = (site_mask(x.layout) == 0).sum().item()
    assert token.grad.tolist() == pytest.approx([masked] * 2, rel=0.01)


@IN_FLOAT64
@pytest.mark.parametrize("ndim", GRIDS)
def test_gradcheck(backend: str, ndim: int) -> None:
    layout = make_layout(draw_mask("equal counts", 1, (2, 1, 2)[:ndim], seed=0), 2)
    images = torch.randn(1, 2, *layout.shape, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(layout.rows, 2, dtype=torch.float64, requires_grad=True)
    token = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def pack(dense: Tensor) -> Tensor:
        return SparseTensor.from_dense(dense, layout.tiles.mask()).features

    def unpack(features: Tensor, fill: Tensor) -> Tensor:
        return SparseTensor(features, layout).dense(fill)

    with use_backend(backend):
        for function, leaves in ((pack, (images,)), (unpack, (rows, token))):
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


FIRST = "cpu" if compiled.loaded else "reference"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="tests what runs without a GPU, and there is one")
@pytest.mark.parametrize(
    ("backend", "dtype", "grid", "expected"),
    [
        ("auto", torch.int64, (2, 2), FIRST),
        ("cpu", torch.float64, (2, 2), FIRST),
        ("cuda", torch.float32, (2, 2), FIRST),
        ("minkowski", torch.float32, (2, 2), FIRST),
        ("reference", torch.float32, (2, 2), "reference"),
        pytest.param("triton", torch.float16, (2, 2), "triton", marks=needs_triton),
        ("triton", torch.float64, (2, 2), FIRST),
        ("triton", torch.int64, (2, 2), FIRST),
        *[(backend, torch.float32, grid, FIRST) for backend in ("auto", "cpu") for grid in [(3,), (2, 2, 2)]],
        *[pytest.param("triton", torch.float32, grid, "triton", marks=needs_triton) for grid in [(3,), (2, 2, 2)]],
    ],
    ids=name,
)
def test_chosen_backend(backend: str, dtype: torch.dtype, grid: tuple[int, ...], expected: str) -> None:
    """No backend refuses and the reference does not warn, since all backends give the same bits."""
    layout = make_layout(draw_mask("random counts", 2, grid, seed=0), 2)
    packing = Packing(torch.zeros(2, 3, *layout.shape, dtype=dtype), layout)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gather_operator.choose(packing) == scatter_operator.choose(packing) == expected


def test_triton_packs_on_the_cpu_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreting", False)
    layout = example_layout()
    with use_backend("triton"):
        assert gather_operator.choose(Packing(torch.zeros(2, 3, *layout.shape), layout)) == FIRST
