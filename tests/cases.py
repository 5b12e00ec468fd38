"""Draw random geometries, and compare an operator with its float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import cuda_emulator
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsecnx import Layout, SparseTensor, TileSet, use_backend
from sparsecnx.backends import compiled, minkowski, triton_launch
from sparsecnx.backends.dispatch import Operator as Dispatcher
from sparsecnx.geometry import packing
from sparsecnx.ops import (
    block,
    convolution,
    depthwise_convolution,
    drop_path,
    global_response_norm,
    layer_normalization,
    mapped,
    pooling,
    site_normalization,
)

# Triton's and CUDA's kernels run on a GPU, or else in the interpreter and the emulator (see conftest.py). The other
# backends run on the CPU.
DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

needs_cpu = pytest.mark.skipif(not compiled.loaded, reason=f"needs the compiled operators: {compiled.why_not}")
needs_triton = pytest.mark.skipif(
    triton_launch.device_refusal(DEVICE) is not None, reason=f"{triton_launch.device_refusal(DEVICE)}"
)
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
needs_cuda = pytest.mark.needs_cuda  # see conftest.py
needs_minkowski = pytest.mark.needs_minkowski  # see conftest.py
NO_MINKOWSKI = minkowski.device_refusal(torch.device("cpu"))
BACKENDS = {
    "reference": (),
    "cpu": needs_cpu,
    "triton": needs_triton,
    "cuda": needs_cuda,
    "minkowski": needs_minkowski,
}
ON_GPU = ("triton", "cuda")


def without_operators(refusal: str, build: str | None) -> NoReturn:
    """Fail a test whose GPU operators are missing on a GPU; skip it where SPARSECNX_BUILD says that none were built.

    A run that skips them would look like one that passed.
    """
    if build in ("cpu", "none"):
        pytest.skip(f"SPARSECNX_BUILD={build}: {refusal}")
    pytest.fail(f"{refusal} (with SPARSECNX_BUILD=cpu in the environment this test is skipped)")


# This is the largest ||out - ref|| / ||ref|| by dtype.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda dtype: str(dtype).removeprefix("torch."))

TILES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


def name(value: object) -> str:
    """Return an id that spells the value."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def draw_mask(kind: str, batch: int, grid: tuple[int, ...], seed: int) -> Tensor:
    """Return a mask, bool `(batch, *grid)`, True = masked."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, math.prod(grid), generator=generator)
    if kind == "all visible":
        mask = torch.zeros_like(noise, dtype=torch.bool)
    elif kind == "none visible":
        mask = torch.ones_like(noise, dtype=torch.bool)
    elif kind == "equal counts":
        kept = 1 + seed % math.prod(grid)
        mask = noise.argsort(dim=1).argsort(dim=1) >= kept
    else:
        mask = noise < 0.5
        if kind == "an empty and a full image":
            mask[0], mask[-1] = True, False
    return mask.view(batch, *grid)


MASKS = ("random counts", "equal counts", "an empty and a full image", "all visible", "none visible")


@st.composite
def masks(draw: Any, ndim: int = 2, sites: int = 16, tiles: tuple[int, ...] = TILES) -> tuple[Tensor, int]:
    """Draw a mask `(B, *grid)` and the tile side, at most about `sites` sites along an axis."""
    tile = draw(st.sampled_from([tile for tile in tiles if tile <= sites]))
    side = st.integers(1, max(1, min(5, sites // tile)))
    grid = tuple(draw(side) for _ in range(ndim))
    batch = draw(st.integers(1, 3))
    return draw_mask(draw(st.sampled_from(MASKS)), batch, grid, draw(st.integers(0, 999))), tile


@st.composite
def layouts(draw: Any, ndim: int = 2, sites: int = 16, tiles: tuple[int, ...] = TILES) -> Layout:
    return make_layout(*draw(masks(ndim, sites, tiles)))


@st.composite
def boxes(draw: Any, *ndims: int, sites: tuple[int, int, int] = (24, 16, 8), tiles: tuple[int, ...] = TILES) -> Layout:
    """Draw a layout whose tiles may have another side along each axis.

    Args:
        ndims: dimensions to draw from, by default 1 to 3.
        sites: about the most along an axis, in one, two and three dimensions.
    """
    ndim = draw(st.sampled_from(ndims or (1, 2, 3)))
    most = sites[ndim - 1]
    tile = tuple(draw(st.sampled_from([side for side in tiles if side <= most])) for _ in range(ndim))
    grid = tuple(draw(st.integers(1, max(1, min(4, most // side)))) for side in tile)
    mask = draw_mask(draw(st.sampled_from(MASKS)), draw(st.integers(1, 2)), grid, draw(st.integers(0, 999)))
    return make_layout(mask, tile)


def draw_convolution(data: Any, ndim: int) -> tuple[Layout, int, tuple[int, ...], tuple[int, ...]]:
    """Draw a layout, stride, kernel and padding that fit each other."""
    layout = data.draw(layouts(ndim, sites=(24, 16, 8)[ndim - 1]))
    stride = data.draw(st.sampled_from([s for s in (1, 2, 3, 4, 6, 8) if layout.tile[0] % s == 0]))
    kernel = data.draw(st.tuples(*[st.integers(1, (9, 7, 3)[ndim - 1])] * ndim))
    padding = data.draw(st.tuples(*[st.integers(0, size - 1) for size in kernel]))
    return layout, stride, kernel, padding


def make_layout(mask: Tensor, tile: int | tuple[int, ...]) -> Layout:
    """Return the layout of a mask `(B, *grid)` with tiles of that size; `Layout.from_mask` would merge single sites."""
    return Layout(TileSet.from_mask(mask, tuple(mask.shape[1:])), tile)


def example_layout(batch: int = 2, grid: tuple[int, ...] = (3, 2), tile: int | tuple[int, ...] = 4) -> Layout:
    """Return a small layout whose images differ in how much is visible."""
    return make_layout(draw_mask("random counts", batch, grid, seed=1), tile)


def random_sparse(layout: Layout, channels: int, dtype: torch.dtype = torch.float64) -> SparseTensor:
    return SparseTensor(torch.randn(layout.rows, channels, dtype=torch.float64).to(dtype), layout)


def backends(*operators: str) -> list[Any]:
    """Return parameters of a test: the names of the backends that offer all of these operators."""
    found = []
    for backend, marks in BACKENDS.items():
        if all(backend in dispatcher(operator).implementations for operator in operators):
            # The block on CUDA takes its other steps from Triton.
            by_triton = backend == "cuda" and "convnextv2_block" in operators
            found.append(pytest.param(backend, marks=[needs_cuda, needs_triton] if by_triton else marks))
    return found


OPERATORS = {
    operator.name: operator
    for operator in (
        convolution.operator,
        convolution.patchify_operator,
        convolution.transposed_operator,
        convolution.unpatchify_operator,
        block.operator,
        depthwise_convolution.operator,
        drop_path.operator,
        global_response_norm.operator,
        layer_normalization.operator,
        mapped.conv_operator,
        mapped.depthwise_operator,
        mapped.max_operator,
        pooling.max_operator,
        pooling.sum_operator,
        site_normalization.batch_norm_operator,
        site_normalization.group_norm_operator,
        site_normalization.instance_norm_operator,
        packing.gather_operator,
        packing.scatter_operator,
    )
}


def dispatcher(operator: str) -> Dispatcher:
    """Return the `Operator` of that name."""
    return OPERATORS[operator]


# These backends run a whole model. Those of the second list do so in seconds; Triton's interpreter takes minutes.
EVERY_MODEL_BACKEND = backends("conv", "convnextv2_block", "layer_norm")
MODEL_BACKENDS = [
    pytest.param(*backend.values, marks=needs_gpu) if backend.values == ("triton",) else backend
    for backend in EVERY_MODEL_BACKEND
]


def device_of(backend: str) -> torch.device:
    """Return where a backend's tensors lie."""
    return DEVICE if backend in ON_GPU else torch.device("cpu")


def widest(backend: str) -> torch.dtype:
    """Return the most exact dtype that a backend takes."""
    return torch.float32 if backend in ON_GPU else torch.float64


def dtypes_of(backend: str) -> list[torch.dtype]:
    """Return the dtypes that a backend takes."""
    if backend == "minkowski":
        return [torch.float64, torch.float32]
    return [dtype for dtype in BOUNDS if backend not in ON_GPU or dtype != torch.float64]


def bound(backend: str) -> float:
    """Return the error that results in the dtype `widest(backend)` may have."""
    return BOUNDS[widest(backend)]


def place(value: Tensor, backend: str) -> Tensor:
    """Return the tensor where a backend takes it; for the emulator with a guard behind it, where reading fails."""
    if backend == "cuda" and DEVICE.type == "cpu":
        return cuda_emulator.guarded(value)
    return value.to(device_of(backend))


def move(x: SparseTensor, device: torch.device) -> SparseTensor:
    """Return the same tensor and geometry on another device; itself where it is there already."""
    if x.device == device:
        return x
    return SparseTensor(x.features.to(device), Layout(x.layout.tiles.to(device), x.layout.tile, x.layout.stride))


def suit(
    backend: str, x: SparseTensor, parameters: dict[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[SparseTensor, dict[str, Tensor]]:
    """Return features and parameters on the device of a backend, in `dtype`.

    Without `dtype`, float64 becomes the widest dtype that the backend takes, and others stay.
    """

    def suited(value: Tensor) -> Tensor:
        narrow = value.dtype == torch.float64 and widest(backend) != torch.float64
        return place(value.to(dtype or (widest(backend) if narrow else value.dtype)), backend)

    x = move(x, device_of(backend))
    return x.with_features(suited(x.features)), {name: suited(value) for name, value in parameters.items()}


def site_mask(layout: Layout, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return 1 at visible sites, else 0: `(B, 1, *spatial)`."""
    keep = (~layout.tiles.mask()).to(dtype).view(layout.batch, 1, *layout.tiles.grid)
    for axis in range(layout.ndim):
        keep = keep.repeat_interleave(layout.tile[axis], 2 + axis)
    return keep


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return ||out - ref|| / ||ref||; ||out|| where the reference is zero."""
    assert out.shape == ref.shape
    scale = ref.double().norm().item()
    return (out.cpu().double() - ref.cpu().double()).norm().item() / (scale or 1.0)


def assert_close(out: Tensor, ref: Tensor, bound: float = 1e-11) -> None:
    error = relative_error(out, ref)
    assert error < bound, f"relative error {error:.2e}, expected below {bound:.0e}"


Operator = Callable[..., SparseTensor]


def incoming_gradient(shape: torch.Size, mean: float = 1.0) -> Tensor:
    """Return a random gradient, float64, always the same. With a mean, its sums over rows do not cancel."""
    return mean + torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def outputs_and_gradients(
    run: Operator,
    x: SparseTensor,
    parameters: dict[str, Tensor],
    rounding: torch.dtype | None = None,
    mean: float = 1.0,
) -> dict[str, Tensor]:
    """Return the features of `run(x, **parameters)` and the gradients of x and of all parameters, by name.

    The incoming gradient is `incoming_gradient(mean=mean)`, rounded to `rounding`.
    """
    features = x.features.detach().requires_grad_()
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    out = run(x.with_features(features), **leaves).features
    assert out.dtype == x.dtype
    cotangent = incoming_gradient(out.shape, mean).to(rounding or out.dtype).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, [features, *leaves.values()], cotangent)
    for gradient, leaf in zip(gradients, [features, *leaves.values()], strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return {"output": out.detach(), **dict(zip(["gradient of x", *leaves], gradients, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Assert that the tensors of each name have a relative error below `bound`."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error < bound}
    assert not wrong, f"relative errors {wrong}, expected below {bound:.0e}"


def assert_matches_reference(
    run: Operator,
    x: SparseTensor,
    parameters: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    statistics: tuple[str, ...] = (),
    backend: str = "cpu",
    mean: float = 1.0,
) -> None:
    """Assert that `run(x, **parameters)` and every gradient in `dtype` are those of the reference in float64.

    Inputs are float64 and rounded to `dtype` first (those named in `statistics` to float32 at least), and the
    reference gets the same rounded values.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = {name: value.to(wide if name in statistics else dtype) for name, value in parameters.items()}
    exact = {name: value.double() for name, value in rounded.items()}
    with use_backend("reference"):
        expected = outputs_and_gradients(run, x.to(dtype).to(torch.float64), exact, dtype, mean)
    x = move(x.to(dtype), device_of(backend))
    there = {name: place(value, backend) for name, value in rounded.items()}
    with use_backend(backend):
        found = outputs_and_gradients(run, x.with_features(place(x.features, backend)), there, mean=mean)
    assert_same(found, expected, BOUNDS[dtype])


@contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
