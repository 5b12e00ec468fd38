"""The backend `minkowski`: convolutions by MinkowskiEngine where it is installed, and why not where it is not."""

from __future__ import annotations

import collections
import gc
import importlib
import re
import subprocess
import sys
import warnings
import weakref
from itertools import product
from types import ModuleType

import pytest
import torch
from cases import (
    NO_MINKOWSKI,
    assert_close,
    assert_matches_reference,
    assert_same,
    dispatcher,
    draw_convolution,
    draw_mask,
    dtypes_of,
    example_layout,
    layouts,
    name,
    needs_minkowski,
    outputs_and_gradients,
    random_sparse,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import conv_parameters

from sparsecnx import BackendError, Layout, SparseTensor, _minkowski, nn, ops, use_backend
from sparsecnx.backend import BY_NAME
from sparsecnx.ops import minkowski

DTYPES = pytest.mark.parametrize("dtype", dtypes_of("minkowski"), ids=name)
OPERATORS = pytest.mark.parametrize("operator", ["conv", "depthwise_conv"])
CHANNELS = 4


def parameters(operator: str, *kernel: int, out: int = 5) -> dict[str, torch.Tensor]:
    return conv_parameters(CHANNELS, 1, *kernel) if operator == "depthwise_conv" else conv_parameters(out, 4, *kernel)


# --- on MinkowskiEngine


@needs_minkowski
@DTYPES
@pytest.mark.parametrize("ndim", [1, 2, 3])
@settings(max_examples=30)
@given(data=st.data(), channels=st.sampled_from([1, 7]), out=st.sampled_from([1, 5]), bias=st.booleans())
def test_conv_equals_reference(dtype, ndim, data, channels, out, bias):
    """With any padding: kernels that are not centred are embedded in ones that are."""
    layout, stride, kernel, padding = draw_convolution(data, ndim)
    assume(layout.rows < 3000)
    p = conv_parameters(out, channels, *kernel)
    if not bias:
        del p["bias"]

    def run(x, **p):
        return ops.conv(x, **p, stride=stride, padding=padding)

    assert_matches_reference(run, random_sparse(layout, channels), p, dtype, backend="minkowski")


@needs_minkowski
@DTYPES
@pytest.mark.parametrize("ndim", [1, 2, 3])
@settings(max_examples=30)
@given(data=st.data(), channels=st.sampled_from([1, 7]), bias=st.booleans())
def test_depthwise_conv_equals_reference(dtype, ndim, data, channels, bias):
    layout = data.draw(layouts(ndim, sites=(24, 16, 8)[ndim - 1]))
    kernel = data.draw(st.tuples(*[st.sampled_from([1, 3, 5, 7][: 5 - ndim])] * ndim))
    p = conv_parameters(channels, 1, *kernel)
    if not bias:
        del p["bias"]
    x = random_sparse(layout, channels)
    assert_matches_reference(ops.depthwise_conv, x, p, dtype, statistics=("bias",), backend="minkowski")


@pytest.mark.parametrize(("size", "padding"), [(k, p) for k in range(1, 8) for p in range(k)], ids=name)
def test_kernels_of_any_padding_in_one_of_minkowski_engine(size, padding):
    weight = torch.arange(1.0, 1 + size).view(1, 1, size)
    found = minkowski.centred(weight, (padding,))
    width = found.shape[-1]
    first = 0 if width % 2 == 0 else -(width // 2)  # the offset of the first tap there
    values = {first + tap: value for tap, value in enumerate(found.flatten().tolist()) if value}
    assert values == {tap - padding: 1.0 + tap for tap in range(size)}
    its_own = size // 2 if size % 2 else 0
    assert (width == size) == (padding == its_own)


@needs_minkowski
@pytest.mark.parametrize("stride", [1, 2, 4], ids="stride{}".format)
def test_patchify_convolutions_run_on_it_too(stride, monkeypatch):
    """Every other backend leaves them to one matrix product."""
    x = random_sparse(example_layout(tile=4), CHANNELS)
    p = parameters("conv", stride, stride)
    function = _minkowski.library().MinkowskiConvolutionFunction
    calls = []
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: calls.append(args) or apply(*args))
    with use_backend("minkowski"):
        found = ops.conv(x, **p, stride=stride)
    assert len(calls) == 1
    assert_close(found.features, ops.conv(x, **p, stride=stride).features)
    assert found.layout.tiles is x.layout.tiles


@needs_minkowski
def test_a_network_of_modules():
    """Stem, depthwise convolution, downsampling: forward and backward as on the other backends."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 4, stride=4),
        nn.Conv2d(6, 6, 7, padding=3, groups=6),
        nn.GELU(),
        nn.Conv2d(6, 8, 2, stride=2),
        nn.Conv2d(8, 8, 3, padding=1),
    ]
    network = torch.nn.Sequential(*layers).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    x = SparseTensor.from_dense(images, draw_mask("random counts", 2, (2, 3), seed=4))
    p = dict(network.named_parameters())

    def run(x, **p):
        return torch.func.functional_call(network, p, (x,))

    expected = outputs_and_gradients(run, x, p)
    with use_backend("minkowski"):
        found = outputs_and_gradients(run, x, p)
    assert_same(found, expected, 1e-11)


@needs_minkowski
def test_coordinates_and_maps_are_built_once_for_all_layers(monkeypatch):
    manager = _minkowski.library().CoordinateManager
    insert, calls = manager.insert_and_map, []
    monkeypatch.setattr(
        manager, "insert_and_map", lambda *args, **options: calls.append(args) or insert(*args, **options)
    )
    x = random_sparse(example_layout(tile=4), CHANNELS)
    with use_backend("minkowski"):
        for _ in range(3):
            y = ops.depthwise_conv(x, **parameters("depthwise_conv", 3, 3))
            y = ops.conv(y, **parameters("conv", 2, 2, out=CHANNELS), stride=2)
            ops.depthwise_conv(y, **parameters("depthwise_conv", 3, 3))
    assert len(calls) == 2  # one for each stride
    assert len({id(self) for self, *_ in calls}) == 1


@needs_minkowski
def test_layouts_of_the_same_stride_on_the_same_tiles_are_kept_apart():
    tiles = example_layout().tiles
    for layout in (Layout(tiles, 4), Layout(tiles, 2), Layout(tiles, 4, 2), Layout(tiles, 2, 2)):
        p = parameters("depthwise_conv", 3, 3)
        assert_matches_reference(
            ops.depthwise_conv, random_sparse(layout, CHANNELS), p, torch.float64, backend="minkowski"
        )


@needs_minkowski
def test_what_is_kept_for_a_layout_goes_with_it():
    x = random_sparse(example_layout(), CHANNELS)
    with use_backend("minkowski"):
        ops.depthwise_conv(x, **parameters("depthwise_conv", 3, 3))
    kept = weakref.ref(minkowski.maps(x.layout.tiles))
    assert kept() is minkowski.maps(x.layout.tiles)
    del x
    gc.collect()
    assert kept() is None


@needs_minkowski
@OPERATORS
def test_random_numbers_stay_as_they_were(operator):
    x, p = random_sparse(example_layout(), CHANNELS), parameters(operator, 3, 5)
    before = torch.get_rng_state()
    with use_backend("minkowski"):
        getattr(ops, operator)(x, **p)
    assert torch.equal(torch.get_rng_state(), before)


@needs_minkowski
@OPERATORS
def test_compiled_around_it(operator):
    """torch cannot trace it: a graph breaks there, and one that may not break says why."""
    torch._dynamo.reset()
    x, p = random_sparse(example_layout(), CHANNELS), parameters(operator, 3, 3)

    def run(features):
        return getattr(ops, operator)(x.with_features(features * 2), **p).features + 1

    with use_backend("minkowski"):
        assert_close(torch.compile(run, backend="aot_eager")(x.features), run(x.features))
        with pytest.raises(torch._dynamo.exc.Unsupported, match=minkowski.NOT_TRACEABLE):
            torch.compile(run, backend="aot_eager", fullgraph=True)(x.features)


@needs_minkowski
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=name)
@OPERATORS
def test_training_after_evaluation(operator, mode):
    x, p = random_sparse(example_layout(), CHANNELS), parameters(operator, 3, 3)
    run = getattr(ops, operator)
    expected = outputs_and_gradients(run, x, p)
    with use_backend("minkowski"):
        with mode():
            assert_close(run(x, **p).features, expected["output"])
        assert_same(outputs_and_gradients(run, x, p), expected, 1e-11)


@needs_minkowski
@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_dtypes_that_it_does_not_take(operator, dtype):
    x = random_sparse(example_layout(), CHANNELS, dtype)
    message = f"cannot run {operator}: MinkowskiEngine takes float32 and float64, x is {dtype}"
    with use_backend("minkowski"), pytest.raises(BackendError, match=message):
        getattr(ops, operator)(x, **{key: value.to(dtype) for key, value in parameters(operator, 3, 3).items()})


@needs_minkowski
def test_import_leaves_collections_and_warnings_alone():
    program = (
        "import collections, sys, torch; from sparsecnx import _minkowski;"
        "sys.exit(_minkowski.refusal(torch.device('cpu')) or hasattr(collections, 'Sequence'))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- without it


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty stand-in under the library's name."""
    found = ModuleType(_minkowski.NAME)
    monkeypatch.setitem(sys.modules, _minkowski.NAME, found)
    return found


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As where importing the library raises."""

    def import_module(name: str) -> ModuleType:
        assert name == _minkowski.NAME
        raise error

    monkeypatch.delitem(sys.modules, _minkowski.NAME, raising=False)
    monkeypatch.setattr(importlib, "import_module", import_module)


@OPERATORS
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'MinkowskiEngine'", name="MinkowskiEngine"), "not installed"),
        (
            ModuleNotFoundError("No module named 'MinkowskiEngineBackend'", name="MinkowskiEngineBackend"),
            "installed, but does not import: No module named 'MinkowskiEngineBackend'",
        ),
        (ImportError("undefined symbol: _ZN3c10"), "installed, but does not import: undefined symbol: _ZN3c10"),
        (RuntimeError("CUDA error"), "installed, but does not import: CUDA error"),
    ],
    ids=["absent", "half", "another torch", "raises"],
)
def test_it_says_why_it_cannot_be_imported(operator, error, reason, monkeypatch):
    broken(monkeypatch, error)
    x = random_sparse(example_layout(), CHANNELS)
    message = f"backend 'minkowski' cannot run {operator}: MinkowskiEngine is {reason}"
    with use_backend("minkowski"), pytest.raises(BackendError, match=re.escape(message)):
        getattr(ops, operator)(x, **parameters(operator, 3, 3))


def test_a_library_without_cuda(library):
    library.is_cuda_available = lambda: False
    assert _minkowski.refusal(torch.device("cpu")) is None
    found = _minkowski.refusal(torch.device("cuda", 0))
    assert found == "MinkowskiEngine is built for the CPU only, x is on cuda:0"
    library.is_cuda_available = lambda: True
    assert _minkowski.refusal(torch.device("cuda", 0)) is None
    assert _minkowski.refusal(torch.device("meta")) == "MinkowskiEngine runs on the CPU and on CUDA, x is on meta"


def test_our_own_stand_in_is_not_taken_for_it():
    program = (
        "import torch; from sparsecnx.compat import minkowski; minkowski.install();"
        "from sparsecnx import _minkowski; print(_minkowski.refusal(torch.device('cpu')));"
        "minkowski.uninstall(); print(_minkowski.refusal(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    installed, uninstalled = done.stdout.splitlines()
    assert installed == "MinkowskiEngine is answered by sparsecnx.compat.minkowski in this process"
    assert uninstalled == str(NO_MINKOWSKI)


def test_old_names_of_collections_during_the_import_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, _minkowski.NAME, raising=False)
    library = ModuleType(_minkowski.NAME)

    def import_module(name: str) -> ModuleType:
        assert issubclass(list, collections.Sequence) and issubclass(dict, collections.Mapping)  # type: ignore[attr-defined]
        warnings.warn("The MinkowskiEngine was compiled with CPU_ONLY flag. If you want", stacklevel=1)
        return library

    monkeypatch.setattr(importlib, "import_module", import_module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _minkowski.library() is library
    assert not hasattr(collections, "Sequence") and not hasattr(collections, "Mapping")


@OPERATORS
def test_never_without_being_asked_for(operator, monkeypatch):
    def asked(*_):
        raise AssertionError("MinkowskiEngine was looked for")

    monkeypatch.setattr(_minkowski, "problem", asked)
    monkeypatch.setattr(_minkowski, "library", asked)
    x, chosen = random_sparse(example_layout(), CHANNELS, torch.float32), dispatcher(operator)
    for backend, layout in product(("auto", "reference"), (x.layout, example_layout(grid=(2, 2, 1), tile=2))):
        y = random_sparse(layout, CHANNELS, torch.float32)
        with use_backend(backend):
            choice = chosen.explain(y)
        assert choice.backend != "minkowski" and choice.reasons["minkowski"] == BY_NAME
        assert list(choice.reasons)[-1] == "minkowski"


@needs_minkowski
@OPERATORS
def test_explanation_where_it_is_asked_for(operator):
    x = random_sparse(example_layout(), CHANNELS)
    with use_backend("minkowski"):
        choice = dispatcher(operator).explain(x)
    assert (choice.backend, choice.reasons["minkowski"]) == ("minkowski", "asked for")
    assert choice.reasons["reference"] == "can run, not asked for"
