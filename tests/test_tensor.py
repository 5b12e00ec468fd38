"""SparseTensor, and packing dense tensors into rows and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import (
    MASKS,
    TILES,
    draw_mask,
    example_layout,
    layouts,
    make_layout,
    needs_cpu,
    random_sparse,
    site_mask,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecnx import Layout, SparseTensor
from sparsecnx.backends import compiled

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GRIDS = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}
PATHS = ["pure torch", pytest.param("compiled", marks=needs_cpu)]


@contextmanager
def packing_by(path: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if path == "pure torch":
            patch.setattr(compiled, "loaded", False)
        yield


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with packing_by(request.param):
        yield request.param


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=0)[::2, ..., ::2]


def some_channels(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]


def some_images(x: Tensor) -> Tensor:
    return torch.cat([x, x])[x.shape[0] :]


def expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


MEMORY: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    channels_last,
    strided,
    some_channels,
    some_images,
    expanded,
    lambda x: x.transpose(-1, 2).contiguous().transpose(-1, 2),
]


def numbered(layout: Layout, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense tensor, NaN at the masked sites: whoever reads one passes it on."""
    shape = (layout.batch, channels, *layout.shape)
    return torch.randn(shape).to(dtype).masked_fill(site_mask(layout) == 0, torch.nan)


def rows_by_coordinates(dense: Tensor, layout: Layout) -> Tensor:
    """What the rows should be, one site at a time."""
    image, *place = layout.coordinates().long().unbind(1)
    return dense[(image, slice(None), *place)]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("ndim", "tile"), [(n, t) for n in GRIDS for t in TILES if t**n < 600])
def test_round_trip(path: str, ndim: int, tile: int, kind: str) -> None:
    layout = make_layout(draw_mask(kind, 2, GRIDS[ndim], seed=4), tile)
    images = numbered(layout, 3)
    x = SparseTensor.from_dense(images, layout.tiles.mask())
    assert x.shape == images.shape and x.layout.tile == tile
    assert torch.equal(x.features, rows_by_coordinates(images, layout))
    dense = x.dense()
    assert dense.shape == images.shape and dense.dtype == images.dtype
    assert torch.equal(dense, images.nan_to_num() * site_mask(layout))


@given(st.data(), st.integers(1, 3), st.sampled_from(MEMORY), st.sampled_from(DTYPES), st.integers(1, 9))
@pytest.mark.parametrize("by", PATHS)
def test_round_trip_of_any_memory_and_dtype(
    by: str, data: st.DataObject, ndim: int, memory: Callable[[Tensor], Tensor], dtype: torch.dtype, channels: int
) -> None:
    layout = data.draw(layouts(ndim, sites=(16, 12, 6)[ndim - 1]))
    images = memory(numbered(layout, channels, dtype))
    with packing_by(by):
        x = SparseTensor.from_dense(images, layout.tiles.mask().view(-1, *layout.tiles.grid))
        assert x.dtype == dtype and torch.equal(x.features, rows_by_coordinates(images, layout))
        assert torch.equal(x.dense(), images.nan_to_num() * site_mask(layout, dtype))
        # Rows that are not contiguous.
        sliced = x.with_features(torch.cat([x.features] * 2, dim=1)[:, channels:])
        assert torch.equal(sliced.dense(), x.dense())


@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 9))
@needs_cpu
def test_compiled_equals_pure_torch(data: st.DataObject, dtype: torch.dtype, channels: int) -> None:
    layout = data.draw(layouts(2))
    images = torch.randn(layout.batch, channels, *layout.shape).to(dtype)
    fill = torch.randn(channels).to(dtype)
    found = []
    for by in ("compiled", "pure torch"):
        leaf, token = images.clone().requires_grad_(), fill.clone().requires_grad_()
        with packing_by(by):
            x = SparseTensor.from_dense(leaf, layout.tiles.mask())
            dense = x.dense(token)
            dense.backward(images.flip(0))
        found.append((x.features, dense, leaf.grad, token.grad))
    *exact, compiled_sum = found[0]
    *expected, pure_sum = found[1]
    assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))
    # Sums of a thousand numbers, in another order.
    bound = math.sqrt(images.numel()) * images.abs().max() * 4 * torch.finfo(dtype).eps
    assert (compiled_sum - pure_sum).abs().max() <= bound


@pytest.mark.parametrize("visible", [None, 2])
def test_visible(path: str, visible: int | None) -> None:
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    images = torch.randn(2, 3, 8, 8)
    x = SparseTensor.from_dense(images, mask, visible)
    assert x.layout.tiles.visible == 2 and x.layout.rows_per_image == 32
    assert torch.equal(x.features, rows_by_coordinates(images, x.layout))
    with pytest.raises(ValueError, match="mask does not keep visible=3 tiles in every image"):
        SparseTensor.from_dense(images, mask, visible=3)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_arbitrary_masks_of_sites(batch: int, height: int, width: int, share: float, seed: int) -> None:
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < share
    images = torch.randn(batch, 4, height, width)
    x = SparseTensor.from_dense(images, mask)
    assert (x.layout.tile, x.layout.tiles.grid) == (1, (height, width))
    assert torch.equal(x.features, images.movedim(1, -1)[~mask])
    assert torch.equal(x.dense(), images.masked_fill(mask[:, None], 0))


@pytest.mark.parametrize("ndim", GRIDS)
@pytest.mark.parametrize("kind", MASKS)
def test_fill_and_its_gradient(path: str, kind: str, ndim: int) -> None:
    layout = make_layout(draw_mask(kind, 2, GRIDS[ndim], seed=4), 2)
    x, keep = random_sparse(layout, 3), site_mask(layout)
    assert torch.equal(x.dense(-2.5), x.dense() - 2.5 * (1 - keep))

    token = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    features = x.features.requires_grad_()
    dense = x.dense(token)
    shaped = token.detach().view(1, 3, *([1] * ndim))
    assert torch.equal(dense, x.dense() + shaped * (1 - keep))

    incoming = torch.randn_like(dense)
    grad_features, grad_token = torch.autograd.grad(dense, [features, token], incoming)
    assert torch.equal(grad_features, rows_by_coordinates(incoming, layout))
    sums = (incoming * (1 - keep)).movedim(1, 0).flatten(1).sum(1)
    torch.testing.assert_close(grad_token, sums, rtol=0, atol=1e-12)


def test_fill_takes_the_dtype_of_the_features(path: str) -> None:
    x = random_sparse(example_layout(), 2, torch.bfloat16)
    token = torch.tensor([1.0, 2.0], requires_grad=True)
    dense = x.dense(token)
    assert dense.dtype == torch.bfloat16
    dense.sum().backward()
    assert token.grad is not None and token.grad.dtype == torch.float32
    masked = (site_mask(x.layout) == 0).sum().item()
    assert token.grad.tolist() == pytest.approx([masked] * 2, rel=0.01)


@pytest.mark.parametrize("ndim", GRIDS)
def test_gradient_of_from_dense_is_the_scatter(path: str, ndim: int) -> None:
    layout = example_layout(grid=GRIDS[ndim], tile=3)
    images = torch.randn(2, 3, *layout.shape, requires_grad=True)
    x = SparseTensor.from_dense(images, layout.tiles.mask())
    incoming = torch.randn_like(x.features)
    (gradient,) = torch.autograd.grad(x.features, images, incoming)
    assert torch.equal(gradient, x.with_features(incoming).dense())
    # An incoming gradient with strides of its own: the sum expands one number.
    (gradient,) = torch.autograd.grad(SparseTensor.from_dense(images, layout.tiles.mask()).features.sum(), images)
    assert torch.equal(gradient, site_mask(layout, torch.float32).expand_as(images))


@pytest.mark.parametrize("ndim", GRIDS)
def test_gradcheck(path: str, ndim: int) -> None:
    layout = make_layout(draw_mask("equal counts", 1, (2, 1, 2)[:ndim], seed=0), 2)
    mask = layout.tiles.mask()
    images = torch.randn(1, 2, *layout.shape, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(layout.rows, 2, dtype=torch.float64, requires_grad=True)
    token = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def pack(dense: Tensor) -> Tensor:
        return SparseTensor.from_dense(dense, mask).features

    def unpack(features: Tensor, fill: Tensor) -> Tensor:
        return SparseTensor(features, layout).dense(fill)

    assert torch.autograd.gradcheck(pack, (images,))
    assert torch.autograd.gradcheck(unpack, (rows, token))
    assert torch.autograd.gradgradcheck(pack, (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(unpack, (rows, token), fast_mode=True)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_custom_operators_are_registered_right(dtype: torch.dtype) -> None:
    layout = example_layout(tile=2)
    index, shape = layout.tiles.index, layout.shape
    dense = torch.randn(2, 3, *shape).to(dtype).requires_grad_()
    rows, fill = torch.randn(layout.rows, 3).to(dtype).requires_grad_(), torch.randn(3).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.sparsecnx.gather_tiles.default, (dense, index, 2))
    torch.library.opcheck(torch.ops.sparsecnx.gather_tiles.default, (channels_last(dense.detach()), index, 2))
    torch.library.opcheck(torch.ops.sparsecnx.scatter_tiles.default, (rows, fill, index, 2, *shape, 2))
    torch.library.opcheck(torch.ops.sparsecnx.scatter_tiles.default, (rows, fill.detach(), index, 2, *shape, 2))


def test_immutable() -> None:
    x = random_sparse(example_layout(), 3)
    for name in ("features", "layout", "color"):
        with pytest.raises(AttributeError, match=f"SparseTensor is immutable: cannot set '{name}'; use with_features"):
            setattr(x, name, None)


def test_names_of_what_it_holds() -> None:
    layout = example_layout(batch=2, grid=(3, 2), tile=4)
    x = random_sparse(layout, 5, torch.float32)
    assert x.F is x.features and x.layout is layout
    assert torch.equal(x.C, layout.coordinates()) and torch.equal(x.coordinates, x.C)
    assert x.shape == tuple(x.dense().shape) == (2, 5, 12, 8)
    assert (x.dtype, x.device) == (torch.float32, torch.device("cpu"))
    coarse = SparseTensor(x.features[::4], layout.coarsen(2))
    assert repr(coarse) == (
        f"SparseTensor(shape=(2, 5, 6, 4), rows={layout.rows // 4}, tile=2, stride=2, dtype=torch.float32, device=cpu)"
    )


def test_with_features_and_to() -> None:
    x = random_sparse(example_layout(), 3)
    wider = x.with_features(torch.randn(x.layout.rows, 7))
    assert wider.layout is x.layout and wider.shape[1] == 7
    coarse = x.layout.coarsen(2)
    assert x.with_features(x.features[::4], coarse).layout is coarse
    half = x.to(torch.float16)
    assert half.dtype == torch.float16 and half.layout is x.layout
    assert torch.equal(half.features, x.features.half()) and x.dtype == torch.float64


IMAGES = torch.zeros(2, 3, 8, 8)
MASK = torch.tensor([[True, False, True, False]] * 2)


@pytest.mark.parametrize(
    ("dense", "mask", "error", "message"),
    [
        ([[0.0]], MASK, TypeError, r"dense is a list: expected a tensor \(B, C, \*spatial\)"),
        (IMAGES[0, 0], MASK, ValueError, r"dense is \(8, 8\): expected \(B, C, \*spatial\)"),
        (IMAGES[:0], MASK[:0], ValueError, r"dense is \(0, 3, 8, 8\): expected at least one image"),
        (IMAGES, MASK.to("meta"), ValueError, "mask is on meta: dense is on cpu"),
        (IMAGES, MASK[:1], ValueError, r"mask is \(1, 4\): dense holds 2 images"),
        (IMAGES, MASK.float(), TypeError, r"mask is torch\.float32: expected torch\.bool"),
        (IMAGES, MASK.tolist(), TypeError, "mask is a list: expected a bool tensor"),
        (IMAGES, torch.tensor(True), ValueError, r"mask is \(\): expected \(B, L\)"),
        (IMAGES, MASK[:, :3], ValueError, r"mask is \(2, 3\): no grid of square tiles .* 8x8 sites"),
        (IMAGES[..., :6], MASK, ValueError, r"mask is \(2, 4\): no grid of square tiles .* 8x6 sites"),
    ],
)
def test_from_dense_errors(dense: Tensor, mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseTensor.from_dense(dense, mask)


def test_constructor_errors() -> None:
    layout = SparseTensor.from_dense(IMAGES, MASK).layout
    needs = r"the layout needs \(64, C\), a row per active site"
    for shape in [(63, 3), (64,), (64, 3, 1)]:
        with pytest.raises(ValueError, match=rf"features is \({shape[0]},.*\): {needs}"):
            SparseTensor(torch.zeros(shape), layout)
    with pytest.raises(ValueError, match="features is on meta: the layout is on cpu"):
        SparseTensor(torch.zeros(64, 3, device="meta"), layout)
    x = SparseTensor(torch.zeros(64, 3), layout)
    with pytest.raises(ValueError, match=r"features is \(64, 3\): the layout needs \(16, C\)"):
        x.with_features(x.features, layout.coarsen(2))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 3)])
def test_fill_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    x = SparseTensor.from_dense(IMAGES, MASK)
    with pytest.raises(ValueError, match=r"fill is \(.*\): expected a number or \(3,\)"):
        x.dense(torch.zeros(shape))
