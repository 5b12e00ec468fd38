"""The backend `minkowski`: its convolutions where MinkowskiEngine is installed, its refusals where it is not."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import gc
import importlib
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from itertools import product
from pathlib import Path
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

from sparsecnx import BackendError, Layout, SparseTensor, models, ops, use_backend
from sparsecnx.backends import minkowski
from sparsecnx.compat import minkowski as api
from sparsecnx.geometry.minkowski_maps import maps
from sparsecnx.ops.depthwise_convolution import minkowski as depthwise

DTYPES = pytest.mark.parametrize("dtype", dtypes_of("minkowski"), ids=name)
OPERATORS = pytest.mark.parametrize("operator", ["conv", "depthwise_conv"])
OFFERED = pytest.mark.parametrize("operator", ["conv", "patchify", "depthwise_conv", "convnextv2_block"])
CPU = torch.device("cpu")
CHANNELS = 4


def parameters(operator: str, *kernel: int, out: int = 5) -> dict[str, torch.Tensor]:
    return conv_parameters(CHANNELS, 1, *kernel) if operator == "depthwise_conv" else conv_parameters(out, 4, *kernel)


# The tests from here on run where MinkowskiEngine is installed.


@needs_minkowski
@DTYPES
@pytest.mark.parametrize("ndim", [1, 2, 3])
@settings(max_examples=30)
@given(data=st.data(), channels=st.sampled_from([1, 7]), out=st.sampled_from([1, 5]), bias=st.booleans())
def test_conv_equals_reference(dtype, ndim, data, channels, out, bias):
    """Any padding works: a kernel that is not centred becomes part of a larger one that is."""
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
    function = minkowski.library().MinkowskiConvolutionFunction
    calls = []
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: calls.append(args) or apply(*args))
    with use_backend("minkowski"):
        found = ops.conv(x, **p, stride=stride)
    assert len(calls) == 1
    assert_close(found.features, ops.conv(x, **p, stride=stride).features)
    assert found.layout.tiles is x.layout.tiles


@needs_minkowski
def test_the_published_model(monkeypatch):
    """Every convolution of encoder and decoder is MinkowskiEngine's, forward and backward."""
    channelwise, function = (
        getattr(minkowski.library(), kind)
        for kind in ("MinkowskiChannelwiseConvolution", "MinkowskiConvolutionFunction")
    )
    calls = []
    forward, apply = channelwise.forward, function.apply
    monkeypatch.setattr(channelwise, "forward", lambda *args: calls.append("depthwise") or forward(*args))
    monkeypatch.setattr(function, "apply", lambda *args: calls.append("conv") or apply(*args))
    network = models.FCMAE(models.ConvNeXtV2Encoder(depths=(1, 1, 2, 1), dims=(4, 8, 8, 12)), decoder_dim=8).double()
    for key, parameter in network.named_parameters():
        if "grn" in key:  # which begin at 0
            torch.nn.init.normal_(parameter)
    images, mask = torch.randn(2, 3, 64, 96, dtype=torch.float64), draw_mask("equal counts", 2, (2, 3), seed=4)
    leaves = dict(network.named_parameters())

    def run():
        outputs = dict(zip(("loss", "prediction"), network(images, mask=mask)[:2], strict=True))
        total = sum(value.sin().sum() for value in outputs.values())
        return outputs | dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    expected = {}
    for backend in ("reference", "auto"):
        with use_backend(backend):
            expected[backend] = run()
    assert not calls
    with use_backend("minkowski"):
        found = run()
    # They are stem, three downsamplings, projection and prediction of the decoder, and five blocks and the decoder's.
    assert sorted(calls) == ["conv"] * 6 + ["depthwise"] * 6
    for backend in expected:
        assert_same(found, expected[backend], 1e-11)


@needs_minkowski
def test_coordinates_and_maps_are_built_once_for_all_layers(monkeypatch):
    manager = minkowski.library().CoordinateManager
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
    kept = weakref.ref(maps(x.layout.tiles))
    assert kept() is maps(x.layout.tiles)
    del x
    gc.collect()
    assert kept() is None


@needs_minkowski
@OPERATORS
def test_compiled_around_it(operator):
    """torch cannot trace it. A graph breaks there, and one that must not break says why."""
    torch._dynamo.reset()
    x, p = random_sparse(example_layout(), CHANNELS), parameters(operator, 3, 3)

    def run(features):
        return getattr(ops, operator)(x.with_features(features * 2), **p).features + 1

    with use_backend("minkowski"):
        assert_close(torch.compile(run, backend="aot_eager")(x.features), run(x.features))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="MinkowskiEngine cannot be traced"):
            torch.compile(run, backend="aot_eager", fullgraph=True)(x.features)


@needs_minkowski
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=name)
@OPERATORS
def test_training_after_evaluation_draws_no_random_numbers(operator, mode):
    x, p = random_sparse(example_layout(), CHANNELS), parameters(operator, 3, 3)
    run = getattr(ops, operator)
    expected = outputs_and_gradients(run, x, p)
    before = torch.get_rng_state()
    with use_backend("minkowski"):
        with mode():
            assert_close(run(x, **p).features, expected["output"])
        assert_same(outputs_and_gradients(run, x, p), expected, 1e-11)
    assert torch.equal(torch.get_rng_state(), before)


@needs_minkowski
@OPERATORS
def test_threads_with_kernels_of_their_own(operator):
    """Two threads run on the same tiles at the same time, each with its own kernel."""
    x = random_sparse(example_layout(tile=4), CHANNELS)
    p = [parameters(operator, 5, 5, out=CHANNELS) for _ in range(2)]
    run = getattr(ops, operator)
    expected = [outputs_and_gradients(run, x, each) for each in p]
    for _ in range(5):  # coordinates and kernel maps are built anew
        y = random_sparse(example_layout(tile=4), 1).with_features(x.features)
        start = threading.Barrier(2)

        def repeat(each, y=y, start=start):
            start.wait(60)
            return [outputs_and_gradients(run, y, each) for _ in range(10)]

        with use_backend("minkowski"), ThreadPoolExecutor(2) as pool:
            for results, alone in zip(pool.map(repeat, p), expected, strict=True):
                for found in results:
                    assert_same(found, alone, 1e-11)


@needs_minkowski
@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_dtypes_that_it_does_not_take(operator, dtype):
    x = random_sparse(example_layout(), CHANNELS, dtype)
    message = f"cannot run {operator}: MinkowskiEngine takes float32 and float64, x is {dtype}"
    with use_backend("minkowski"), pytest.raises(BackendError, match=message):
        getattr(ops, operator)(x, **{key: value.to(dtype) for key, value in parameters(operator, 3, 3).items()})


@needs_minkowski
def test_import_leaves_collections_warnings_and_the_environment_alone():
    program = (
        "import collections, os, sys, torch; from sparsecnx.backends import minkowski;"
        "os.cpu_count = lambda: 64; before = dict(os.environ);"  # It warns on more than 16 cores.
        "refusal = minkowski.device_refusal(torch.device('cpu'));"
        "sys.exit(refusal or hasattr(collections, 'Sequence') or os.environ != before)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


# The tests from here on run where it is not installed, or does not run.


@OFFERED
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
        (None, "not installed"),
    ],
    ids=["absent", "half", "another torch", "raises", "blocked"],
)
def test_it_says_why_it_cannot_be_imported(operator, error, reason, monkeypatch):
    def import_module(name: str) -> ModuleType:
        assert name == minkowski.NAME
        raise error

    if error is None:
        monkeypatch.setitem(sys.modules, minkowski.NAME, None)
    else:
        monkeypatch.delitem(sys.modules, minkowski.NAME, raising=False)
        monkeypatch.setattr(importlib, "import_module", import_module)
    message = f"backend 'minkowski' cannot run {operator}: MinkowskiEngine is {reason}"
    with use_backend("minkowski"), pytest.raises(BackendError, match=re.escape(message)):
        dispatcher(operator).choose(random_sparse(example_layout(), CHANNELS))


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path of the code of a package under the library's name, which is imported anew."""
    code = tmp_path / minkowski.NAME / "__init__.py"
    code.parent.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setitem(sys.modules, minkowski.NAME, None)  # So that what the test imports is removed afterwards.
    del sys.modules[minkowski.NAME]
    return code


@pytest.mark.parametrize("first", ["ours", "plain"])
def test_threads_wait_for_the_import(first, on_disk, monkeypatch):
    """All threads may import it through us at once, or one by a plain `import` somewhere else."""

    class Slow(list):
        def __iter__(self):
            for found in super().__iter__():
                time.sleep(0.002)
                yield found

    old_names = ""
    if first == "ours":
        old_names = "collections.Mapping, collections.Sequence\n"
        monkeypatch.setattr(collections.abc, "__all__", Slow(collections.abc.__all__))
    on_disk.write_text(f"import collections, time\n{old_names}time.sleep(0.2)\ndef is_cuda_available(): return True\n")
    start = threading.Barrier(4)

    def run(number):
        start.wait(60)
        if first == "plain":
            if number == 0:
                return importlib.import_module(minkowski.NAME).is_cuda_available()
            while minkowski.NAME not in sys.modules:  # Until it is half imported.
                pass
        return minkowski.library().is_cuda_available()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [True] * 4
    assert not hasattr(collections, "Mapping")


@pytest.mark.parametrize(
    ("cores", "given", "during"), [(16, None, None), (17, None, "16"), (17, "3", "3"), (None, None, None)], ids=str
)
def test_the_import_leaves_environment_collections_and_warnings_alone(cores, given, during, monkeypatch):
    """If OMP_NUM_THREADS stayed set, it would be torch's number of threads in every child of this process."""
    monkeypatch.delitem(sys.modules, minkowski.NAME, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    library = ModuleType(minkowski.NAME)

    def import_module(name: str) -> ModuleType:
        assert os.environ.get("OMP_NUM_THREADS") == during
        assert issubclass(list, collections.Sequence) and issubclass(dict, collections.Mapping)  # type: ignore[attr-defined]
        warnings.warn("The MinkowskiEngine was compiled with CPU_ONLY flag. If you want", stacklevel=1)
        if cores == 16:
            raise ImportError("undefined symbol")
        return library

    monkeypatch.setattr(importlib, "import_module", import_module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(ImportError):
            assert minkowski.library() is library
    assert os.environ.get("OMP_NUM_THREADS") == given
    assert not hasattr(collections, "Sequence") and not hasattr(collections, "Mapping")


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the fork as the backend uses it, made of our own API; `calls` lists what its layers were given."""
    found = ModuleType("fork")
    vars(found).update({key: getattr(api, key) for key in ("CoordinateManager", "CoordinateMapType", "SparseTensor")})
    calls = found.calls = []

    def layer(kind):
        class Layer(kind):
            def __init__(self, *args, **options):
                calls.append((kind.__name__, args, options))
                super().__init__(*args, **options)

            def forward(self, x):
                calls.append(tuple(self.kernel.shape))
                return super().forward(x)

        return Layer

    found.MinkowskiDepthwiseConvolution = layer(api.MinkowskiDepthwiseConvolution)
    found.MinkowskiChannelwiseConvolution = layer(api.MinkowskiChannelwiseConvolution)
    monkeypatch.setattr(minkowski, "library", lambda: found)
    return found


def said_to_be_on(device: str, x: SparseTensor) -> SparseTensor:
    """Return the same tensor, which only says that it lies on another device."""

    kind = type("Elsewhere", (SparseTensor,), {"device": torch.device(device)})
    return kind(x.features, x.layout)


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "MinkowskiChannelwiseConvolution"), ("cuda", "MinkowskiDepthwiseConvolution")],
)
def test_depthwise_kernel_of_the_fork(device, kind, fork):
    """The fork has a kernel for GPUs and none for the CPU."""
    x, p = random_sparse(example_layout(), CHANNELS), parameters("depthwise_conv", 3, 5)
    expected = outputs_and_gradients(ops.depthwise_conv, x, p)
    before = torch.get_rng_state()

    def run(x, **p):
        return x.with_features(depthwise.depthwise_conv(said_to_be_on(device, x), **p))

    assert_same(outputs_and_gradients(run, x, p), expected, 1e-11)
    assert fork.calls == [(kind, (CHANNELS, (3, 5)), {"dimension": 2}), (15, CHANNELS)]
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_the_gradients_of_the_fork(fork):
    x, p = random_sparse(example_layout(), CHANNELS), parameters("depthwise_conv", 3, 3)
    features = x.features.requires_grad_()
    out = depthwise.depthwise_conv(said_to_be_on("cuda", x), p["weight"], None)
    (first,) = torch.autograd.grad(out.sum(), features, create_graph=True)
    for ask in (first.sum().backward, lambda: torch.autograd.grad(first.sum(), features)):
        with pytest.raises(NotImplementedError, match="no gradients of the gradients of its convolutions"):
            ask()


def test_a_library_without_cuda(monkeypatch):
    library = ModuleType(minkowski.NAME)
    monkeypatch.setitem(sys.modules, minkowski.NAME, library)
    for cuda, refusal in ((False, "MinkowskiEngine is built for the CPU only, x is on cuda:0"), (True, None)):
        library.is_cuda_available = lambda cuda=cuda: cuda
        assert minkowski.device_refusal(CPU) is None
        assert minkowski.device_refusal(torch.device("cuda", 0)) == refusal
    assert minkowski.device_refusal(torch.device("meta")) == "MinkowskiEngine runs on the CPU and on CUDA, x is on meta"


def test_our_own_stand_in_is_not_taken_for_it():
    program = (
        "import torch; from sparsecnx.compat import minkowski; minkowski.install();"
        "from sparsecnx.backends import minkowski as backend; print(backend.device_refusal(torch.device('cpu')));"
        "minkowski.uninstall(); print(backend.device_refusal(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    installed, uninstalled = done.stdout.splitlines()
    assert installed == "MinkowskiEngine is answered by sparsecnx.compat.minkowski in this process"
    assert uninstalled == str(NO_MINKOWSKI)


@OFFERED
def test_never_without_being_asked_for(operator, monkeypatch):
    def asked(*_):
        raise AssertionError("MinkowskiEngine was looked for")

    monkeypatch.setattr(minkowski, "problem", asked)
    monkeypatch.setattr(minkowski, "library", asked)
    x, chosen = random_sparse(example_layout(), CHANNELS, torch.float32), dispatcher(operator)
    for backend, layout in product(("auto", "reference"), (x.layout, example_layout(grid=(2, 2, 1), tile=2))):
        with use_backend(backend):
            choice = chosen.explain(random_sparse(layout, CHANNELS, torch.float32))
        assert choice.backend != "minkowski" and choice.reasons["minkowski"] == minkowski.BY_NAME
