"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import assert_close, example_layout, needs_native, random_sparse

from sparsecnx import BackendError, SparseTensor, _extension, ops, use_backend
from sparsecnx.backend import Implementation, Operator, always
from sparsecnx.ops.depthwise_conv import operator as depthwise_conv
from sparsecnx.ops.grn import operator as grn

CHANNELS = 4
BACKENDS = ("auto", "reference", "native", "triton", "minkowski")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


CALLS: dict[str, Callable[[SparseTensor], SparseTensor]] = {
    "conv": lambda x: ops.conv(x, draw(3, CHANNELS, *[3] * x.layout.ndim), draw(3), stride=2, padding=1),
    "depthwise_conv": lambda x: ops.depthwise_conv(x, draw(CHANNELS, 1, *[5] * x.layout.ndim), draw(CHANNELS)),
    "grn": lambda x: ops.grn(x, draw(CHANNELS), draw(CHANNELS)),
    "layer_norm": lambda x: ops.layer_norm(x, draw(CHANNELS), draw(CHANNELS)),
}


def selection() -> str:
    """The backend that is selected: `auto` takes the first that an operator offers."""
    offers = {name: Implementation(lambda x: x, always) for name in BACKENDS}
    return Operator("probe", **offers).choose(random_sparse(example_layout(), 1))


@pytest.fixture
def x() -> SparseTensor:
    return random_sparse(example_layout(), CHANNELS)


@pytest.fixture
def volume() -> SparseTensor:
    return random_sparse(example_layout(grid=(2, 2, 1), tile=2), CHANNELS)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    """As where nothing is compiled."""
    monkeypatch.setattr(_extension, "loaded", False)
    monkeypatch.setattr(_extension, "why_not", "built as pure Python because: no C++ compiler")
    return "built as pure Python because: no C++ compiler"


@pytest.mark.parametrize("name", ["cuda", "", "Native", None])
def test_unknown_name(name: str) -> None:
    message = f"backend is {name!r}: expected one of auto, reference, native, triton, minkowski"
    with pytest.raises(ValueError, match=re.escape(message)), use_backend(name):
        pytest.fail("entered the block")
    assert selection() == "auto"


def test_selection_nests_and_is_restored() -> None:
    with use_backend("reference"):
        with use_backend("native"):
            assert selection() == "native"
            with use_backend("auto"):
                assert selection() == "auto"
        assert selection() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert selection() == "reference"
        with pytest.raises(ValueError, match="expected one of"), use_backend("none"):
            pass
        assert selection() == "reference"
    assert selection() == "auto"


def test_every_name_is_accepted() -> None:
    for name in BACKENDS:
        with use_backend(name):
            assert selection() == name


@needs_native
def test_native_refuses_three_dimensions(volume: SparseTensor) -> None:
    message = (
        "backend 'native' cannot run depthwise_conv: compiled kernel is two-dimensional, x has 3 spatial dimensions"
    )
    with use_backend("native"), pytest.raises(BackendError, match=message):
        CALLS["depthwise_conv"](volume)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["triton", "minkowski"])
def test_backends_not_offered(x: SparseTensor, name: str, call: str) -> None:
    message = f"backend '{name}' cannot run {call}: this version offers native, reference"
    with use_backend(name), pytest.raises(BackendError, match=message):
        CALLS[call](x)


@pytest.mark.parametrize("call", CALLS)
def test_native_says_why_it_is_missing(x: SparseTensor, missing: str, call: str) -> None:
    with use_backend("native"), pytest.raises(BackendError, match=re.escape(f"cannot run {call}: {missing}")):
        CALLS[call](x)


def test_auto_falls_to_the_reference_with_one_warning_per_operator(x: SparseTensor, missing: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in CALLS.values():
            for _ in range(3):
                call(x)
    said = [str(warning.message) for warning in caught]
    assert said == [
        f"{name} runs on the slow dense reference (native: {missing}). `sparsecnx doctor` says what to do."
        for name in CALLS
    ]
    assert depthwise_conv.choose(x) == grn.choose(x) == "reference"


def test_reference_by_name_is_silent(x: SparseTensor, missing: str) -> None:
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        for call in CALLS.values():
            call(x)


@needs_native
def test_auto_takes_native_where_it_can(x: SparseTensor, volume: SparseTensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operator in (depthwise_conv, grn):
            assert operator.choose(x) == "native"
            assert operator.refusal("native", x) is None
        assert grn.choose(volume) == "native"
    with pytest.warns(UserWarning, match="depthwise_conv runs on the slow dense reference .*x has 3 spatial"):
        assert depthwise_conv.choose(volume) == "reference"
    with use_backend("reference"):
        assert grn.choose(x) == "reference"


@needs_native
@pytest.mark.parametrize("call", CALLS)
def test_native_equals_the_reference(x: SparseTensor, call: str) -> None:
    with use_backend("reference"):
        expected = CALLS[call](x)
    for name in ("native", "auto"):
        with use_backend(name):
            found = CALLS[call](x)
        assert (found.layout.tile, found.layout.stride) == (expected.layout.tile, expected.layout.stride)
        assert_close(found.features, expected.features)


def test_the_first_that_can_runs(x: SparseTensor) -> None:
    def refuses(_: SparseTensor) -> str:
        return "too small"

    operator = Operator(
        "sum",
        triton=Implementation(lambda x, y: ("triton", y), refuses),
        native=Implementation(lambda x, y: ("native", y), always),
        reference=Implementation(lambda x, y: ("reference", y), always),
    )
    assert operator(x, 1) == ("native", 1)
    with use_backend("reference"):
        assert operator(x, 2) == ("reference", 2)
    with use_backend("triton"), pytest.raises(BackendError, match="backend 'triton' cannot run sum: too small"):
        operator(x, 3)
    nothing = Operator("sum", native=Implementation(lambda x: x, refuses))
    with pytest.raises(BackendError, match=r"no backend can run sum on SparseTensor\(shape="):
        nothing(x)
