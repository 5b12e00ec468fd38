"""The choice of the backend that runs an operator, and its messages."""

from __future__ import annotations

import logging
import re
import warnings

import pytest
import torch
from cases import DEVICE, assert_close, dispatcher, example_layout, needs_cpu, needs_cuda, needs_triton, random_sparse
from operators import CASES

from sparsecnx import BackendError, SparseTensor, use_backend
from sparsecnx.backends import compiled
from sparsecnx.backends.dispatch import Choice, Implementation, Operator
from sparsecnx.backends.selection import BACKENDS

CHANNELS = 4
# These are the first cases of each operator. 1x1 and patchify convolutions are matrix products without a backend.
CALLS = {case.operator: case for name, case in reversed(CASES.items()) if name not in ("conv-1x1", "conv-2x2-stride2")}


def call(operator: str, x: SparseTensor) -> SparseTensor:
    generator = torch.Generator().manual_seed(3)
    p = CALLS[operator].parameters(CHANNELS)
    drawn = {name: torch.randn(value.shape, generator=generator, dtype=x.dtype) for name, value in p.items()}
    return CALLS[operator].run(x, **drawn)


def selection() -> str:
    """Return the selected backend. `auto` takes the first that an operator offers."""
    offers = {name: Implementation(lambda x: x) for name in BACKENDS}
    return Operator("probe", **offers).choose(random_sparse(example_layout(), 1))


@pytest.fixture
def x() -> SparseTensor:
    return random_sparse(example_layout(), CHANNELS)


@pytest.fixture
def volume() -> SparseTensor:
    return random_sparse(example_layout(grid=(2, 2, 1), tile=2), CHANNELS)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend that nothing is compiled; return the reason."""
    monkeypatch.setattr(compiled, "loaded", False)
    monkeypatch.setattr(compiled, "why_not", "built as pure Python because: no C++ compiler")
    return "built as pure Python because: no C++ compiler"


@pytest.mark.parametrize("name", ["gpu", "", "Native", None])
def test_unknown_name(name: str) -> None:
    message = f"backend is {name!r}: expected one of auto, reference, cpu, cuda, triton, minkowski"
    with pytest.raises(ValueError, match=re.escape(message)), use_backend(name):
        pytest.fail("entered the block")
    assert selection() == "auto"


def test_selection_nests_and_is_restored() -> None:
    with use_backend("reference"):
        for name in BACKENDS:
            with use_backend(name):
                assert selection() == name
        assert selection() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert selection() == "reference"
        with pytest.raises(ValueError, match="expected one of"), use_backend("none"):
            pass
        assert selection() == "reference"
    assert selection() == "auto"


def test_the_old_name_of_the_cpu_backend() -> None:
    with use_backend("native"):
        assert selection() == "cpu"


OFFERED_BY_CUDA = {"depthwise_conv", "convnextv2_block"}
OFFERED_BY_MINKOWSKI = {"conv", "patchify", *OFFERED_BY_CUDA}


@pytest.mark.parametrize(("backend", "offered"), [("cuda", OFFERED_BY_CUDA), ("minkowski", OFFERED_BY_MINKOWSKI)])
@pytest.mark.parametrize("operator", CALLS)
def test_an_operator_that_a_backend_does_not_offer_runs_as_under_auto(
    operator: str, backend: str, offered: set[str], x: SparseTensor
) -> None:
    assert (backend in dispatcher(operator).implementations) == (operator in offered)
    if operator not in offered:
        expected = dispatcher(operator).explain(x)
        with use_backend(backend):
            assert dispatcher(operator).explain(x) == expected
            assert_close(call(operator, x).features, call(operator, x).features)


@pytest.mark.parametrize("operator", CALLS)
def test_cpu_says_why_it_is_missing(operator: str, x: SparseTensor, missing: str) -> None:
    with use_backend("cpu"), pytest.raises(BackendError, match=re.escape(f"cannot run {operator}: {missing}")):
        call(operator, x)


def test_auto_falls_to_the_reference_with_one_warning_per_operator(x: SparseTensor, missing: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operator in CALLS:
            for _ in range(3):
                call(operator, x)
    found = [str(warning.message) for warning in caught]
    assert len(found) == len(CALLS)
    for operator, warning in zip(CALLS, found, strict=True):
        first, *reasons = warning.split("\n")
        assert first == f"{operator} runs on the slow dense reference. `sparsecnx doctor` says what to do."
        assert reasons[0] == f"    cpu: {missing}" and reasons[1].startswith("    triton: ")
        assert dispatcher(operator).choose(x) == "reference"
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        for operator in CALLS:
            call(operator, x)


@needs_cpu
def test_auto_takes_cpu_where_it_can(x: SparseTensor, volume: SparseTensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operator in CALLS:
            assert dispatcher(operator).choose(x) == dispatcher(operator).choose(volume) == "cpu"
    whole = x.with_features(x.features.long())
    with use_backend("cpu"), pytest.raises(BackendError, match=r"cannot run depthwise_conv: x is torch\.int64"):
        dispatcher("depthwise_conv").choose(whole)


@needs_cpu
@pytest.mark.parametrize("operator", CALLS)
def test_cpu_equals_the_reference(operator: str, x: SparseTensor) -> None:
    with use_backend("reference"):
        expected = call(operator, x)
    for name in ("cpu", "auto"):
        with use_backend(name):
            found = call(operator, x)
        assert (found.layout.tile, found.layout.stride) == (expected.layout.tile, expected.layout.stride)
        assert_close(found.features, expected.features)


def three_ways(**options: bool) -> Operator:
    """Return an operator whose fastest implementation takes up to two channels."""

    def refusal(x: SparseTensor) -> str | None:
        return f"x has {x.features.shape[1]} channels" if x.features.shape[1] > 2 else None

    return Operator(
        "sum",
        **options,
        triton=Implementation(lambda x: "triton", refusal, lambda x: f"by {x.features.shape[1]}"),
        cpu=Implementation(lambda x: "cpu"),
        reference=Implementation(lambda x: "reference"),
    )


FASTEST, SLOWER, ASKED, NOT_ASKED = "the fastest that can run", "can run, slower", "asked for", "can run, not asked for"


@pytest.mark.parametrize(
    ("asked", "channels", "backend", "reasons", "detail"),
    [
        ("auto", 2, "triton", (FASTEST, SLOWER, SLOWER), "by 2"),
        ("auto", 3, "cpu", ("x has 3 channels", FASTEST, SLOWER), ""),
        ("reference", 2, "reference", (NOT_ASKED, NOT_ASKED, ASKED), ""),
        ("cpu", 3, "cpu", ("x has 3 channels", ASKED, NOT_ASKED), ""),
        ("cuda", 3, "cpu", ("x has 3 channels", FASTEST, SLOWER), ""),
    ],
)
def test_a_choice_explains_itself(
    asked: str, channels: int, backend: str, reasons: tuple[str, ...], detail: str
) -> None:
    x = random_sparse(example_layout(), channels)
    expected = Choice("sum", backend, dict(zip(("triton", "cpu", "reference"), reasons, strict=True)), detail)
    with use_backend(asked):
        assert three_ways().explain(x) == expected
        assert three_ways()(x) == backend


def test_backend_asked_for_by_name_refuses() -> None:
    """It raises, except where an operator only moves values."""
    x = random_sparse(example_layout(), 3)
    with use_backend("triton"):
        for ask in (three_ways(), three_ways().choose, three_ways().explain):
            with pytest.raises(BackendError, match="backend 'triton' cannot run sum: x has 3 channels"):
                ask(x)
        assert three_ways(strict=False)(x) == "cpu"
    nothing = Operator("sum", cpu=Implementation(lambda x: x, lambda _: "too small"))
    with pytest.raises(BackendError, match=r"no backend can run sum on SparseTensor\(shape="):
        nothing(x)


def test_arguments_reach_the_function(x: SparseTensor) -> None:
    assert Operator("sum", cpu=Implementation(lambda x, y, z: (y, z)))(x, 1, "two") == (1, "two")


def test_the_log_tells_each_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    operator, x = three_ways(), random_sparse(example_layout(), 2)
    operator(x)
    assert not caplog.messages  # Nobody listens to level INFO.
    with caplog.at_level(logging.INFO, logger="sparsecnx"):
        for _ in range(3):
            operator(x)
            operator(x.to(torch.bfloat16))
            operator(random_sparse(example_layout(), 3))
    assert [(record.name, record.levelname) for record in caplog.records] == [("sparsecnx", "INFO")] * 3
    kinds = ("triton (float64 on cpu)", "triton (bfloat16 on cpu)", "cpu (float64 on cpu)")
    assert caplog.messages == [f"sum runs on {kind}" for kind in kinds]


def test_the_log_breaks_no_graph(caplog: pytest.LogCaptureFixture, x: SparseTensor) -> None:
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, logger="sparsecnx")

    def run(features: torch.Tensor) -> torch.Tensor:
        return CALLS["stochastic_depth"].run(x.with_features(features)).features

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x.features)
    assert not [record for record in caplog.records if record.name == "sparsecnx"]
    assert_close(found, run(x.features))
    assert [record.levelname for record in caplog.records if record.name == "sparsecnx"] == ["INFO"]


@needs_cpu
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tests what runs without a GPU, and there is one")
@needs_cuda
@needs_triton
@pytest.mark.parametrize("operator", ["depthwise_conv", "convnextv2_block"])
def test_interpreter_and_emulator_run_only_when_asked_for_by_name(operator: str, x: SparseTensor) -> None:
    x, chosen = x.to(torch.float32), dispatcher(operator)
    choice = chosen.explain(x)
    assert list(choice.reasons) == ["cpu", "triton", "cuda", "minkowski", "reference"]
    assert choice.backend == "cpu"
    assert "only when asked for by name" in choice.reasons["triton"]
    assert choice.reasons["cuda"] == "CUDA operators run on a GPU, x is on cpu"
    for backend in ("triton", "cuda"):
        with use_backend(backend):
            assert chosen.choose(x) == backend
