"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import (
    DEVICE,
    assert_close,
    dispatcher,
    example_layout,
    move,
    needs_cuda,
    needs_cpu,
    needs_triton,
    random_sparse,
)

from sparsecnx import BackendError, SparseTensor, ops, use_backend
from sparsecnx.backends import compiled, cuda, triton_launch
from sparsecnx.backends.dispatch import Choice, Implementation, Operator, always
from sparsecnx.ops.block import operator as convnextv2_block
from sparsecnx.ops.depthwise_convolution import operator as depthwise_conv
from sparsecnx.ops.global_response_norm import operator as grn

CHANNELS = 4
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "minkowski")


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
    monkeypatch.setattr(compiled, "loaded", False)
    monkeypatch.setattr(compiled, "why_not", "built as pure Python because: no C++ compiler")
    return "built as pure Python because: no C++ compiler"


@pytest.mark.parametrize("name", ["gpu", "", "Native", None])
def test_unknown_name(name: str) -> None:
    message = f"backend is {name!r}: expected one of auto, reference, native, cuda, triton, minkowski"
    with pytest.raises(ValueError, match=re.escape(message)), use_backend(name):
        pytest.fail("entered the block")
    assert selection() == "auto"


def test_selection_nests_and_is_restored() -> None:
    with use_backend("reference"):
        with use_backend("cpu"):
            assert selection() == "cpu"
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


@needs_cpu
def test_native_refuses_three_dimensions(volume: SparseTensor) -> None:
    message = (
        "backend 'native' cannot run depthwise_conv: compiled kernel is two-dimensional, x has 3 spatial dimensions"
    )
    with use_backend("cpu"), pytest.raises(BackendError, match=message):
        CALLS["depthwise_conv"](volume)


@pytest.mark.parametrize("call", ["conv", "layer_norm"])
def test_backends_not_offered(x: SparseTensor, call: str) -> None:
    message = f"backend 'cuda' cannot run {call}: this version offers native, triton, reference, minkowski"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        CALLS[call](x)


@pytest.mark.parametrize("call", CALLS)
def test_native_says_why_it_is_missing(x: SparseTensor, missing: str, call: str) -> None:
    with use_backend("cpu"), pytest.raises(BackendError, match=re.escape(f"cannot run {call}: {missing}")):
        CALLS[call](x)


def test_auto_falls_to_the_reference_with_one_warning_per_operator(x: SparseTensor, missing: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in CALLS.values():
            for _ in range(3):
                call(x)
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(CALLS)
    for name, warning in zip(CALLS, said, strict=True):
        assert warning.startswith(f"{name} runs on the slow dense reference (native: {missing}")
        assert warning.endswith("). `sparsecnx doctor` says what to do.")
    assert depthwise_conv.choose(x) == grn.choose(x) == "reference"


def test_reference_by_name_is_silent(x: SparseTensor, missing: str) -> None:
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        for call in CALLS.values():
            call(x)


@needs_cpu
def test_auto_takes_native_where_it_can(x: SparseTensor, volume: SparseTensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operator in (depthwise_conv, grn):
            assert operator.choose(x) == "cpu"
            assert operator.refusal("cpu", x) is None
        assert grn.choose(volume) == "cpu"
    with pytest.warns(UserWarning, match="depthwise_conv runs on the slow dense reference .*x has 3 spatial"):
        assert depthwise_conv.choose(volume) == "reference"
    with use_backend("reference"):
        assert grn.choose(x) == "reference"


@needs_cpu
@pytest.mark.parametrize("call", CALLS)
def test_native_equals_the_reference(x: SparseTensor, call: str) -> None:
    with use_backend("reference"):
        expected = CALLS[call](x)
    for name in ("cpu", "auto"):
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
        native=Implementation(lambda x, y: ("cpu", y), always),
        reference=Implementation(lambda x, y: ("reference", y), always),
    )
    assert operator(x, 1) == ("cpu", 1)
    with use_backend("reference"):
        assert operator(x, 2) == ("reference", 2)
    with use_backend("triton"), pytest.raises(BackendError, match="backend 'triton' cannot run sum: too small"):
        operator(x, 3)
    nothing = Operator("sum", native=Implementation(lambda x: x, refuses))
    with pytest.raises(BackendError, match=r"no backend can run sum on SparseTensor\(shape="):
        nothing(x)


def three_ways() -> Operator:
    """An operator whose fastest implementation takes up to two channels."""

    def refuses(x: SparseTensor) -> str | None:
        return f"x has {x.features.shape[1]} channels" if x.features.shape[1] > 2 else None

    return Operator(
        "sum",
        triton=Implementation(lambda x: "triton", refuses, lambda x: f"by {x.features.shape[1]}"),
        native=Implementation(lambda x: "cpu", always),
        reference=Implementation(lambda x: "reference", always),
    )


@pytest.mark.parametrize(
    ("asked", "channels", "expected"),
    [
        (
            "auto",
            2,
            Choice(
                "sum",
                "triton",
                {"triton": "the fastest that can run", "cpu": "can run, slower", "reference": "can run, slower"},
                "by 2",
            ),
        ),
        (
            "auto",
            3,
            Choice(
                "sum",
                "cpu",
                {"triton": "x has 3 channels", "cpu": "the fastest that can run", "reference": "can run, slower"},
            ),
        ),
        (
            "reference",
            2,
            Choice(
                "sum",
                "reference",
                {
                    "triton": "can run, not asked for",
                    "cpu": "can run, not asked for",
                    "reference": "asked for",
                },
            ),
        ),
        (
            "cpu",
            3,
            Choice(
                "sum",
                "cpu",
                {"triton": "x has 3 channels", "cpu": "asked for", "reference": "can run, not asked for"},
            ),
        ),
    ],
)
def test_a_choice_explains_itself(asked: str, channels: int, expected: Choice) -> None:
    x = random_sparse(example_layout(), channels)
    with use_backend(asked):
        assert three_ways().explain(x) == expected
        assert three_ways()(x) == expected.backend


def test_a_choice_in_words() -> None:
    x = random_sparse(example_layout(), 2)
    others = "(native: can run, slower; reference: can run, slower)"
    assert str(three_ways().explain(x)) == f"sum runs on triton, the fastest that can run, by 2 {others}"
    alone = Operator("sum", reference=Implementation(lambda x: x, always))
    assert str(alone.explain(x)) == "sum runs on reference, the fastest that can run (no other)"


def test_what_runs_by_name_alone() -> None:
    """`auto` does not take it where nothing else can run, and nobody looks whether it could."""

    def looked(_: SparseTensor) -> str | None:
        raise AssertionError("looked for it")

    x = random_sparse(example_layout(), 3)
    only = Operator("sum", special=Implementation(lambda x: "special", looked, by_name=True))
    with pytest.raises(BackendError, match="no backend can run sum"):
        only(x)
    operator = Operator(
        "sum",
        native=Implementation(lambda x: "cpu", lambda _: "not here"),
        minkowski=Implementation(lambda x: "minkowski", looked, by_name=True),
        reference=Implementation(lambda x: "reference", always),
    )
    with pytest.warns(UserWarning, match=r"slow dense reference \(native: not here\)"):
        assert operator(x) == "reference"
    assert operator.explain(x).reasons["minkowski"] == "runs only where it is asked for by name"
    with use_backend("minkowski"):
        with pytest.raises(AssertionError, match="looked for it"):
            operator(x)
        operator.implementations["minkowski"] = Implementation(lambda x: "minkowski", always, by_name=True)
        assert operator(x) == "minkowski"
        assert operator.explain(x).reasons["minkowski"] == "asked for"


def test_what_cannot_run_explains_itself_by_raising() -> None:
    x = random_sparse(example_layout(), 3)
    with use_backend("triton"), pytest.raises(BackendError, match="cannot run sum: x has 3 channels"):
        three_ways().explain(x)


def test_the_log_tells_each_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    operator, x = three_ways(), random_sparse(example_layout(), 2)
    wide = random_sparse(example_layout(), 3)
    operator(x)
    assert not caplog.messages  # nobody listens to level INFO
    with caplog.at_level(logging.INFO, logger="sparsecnx"):
        for _ in range(3):
            operator(x)
            operator(x.to(torch.bfloat16))
            operator(wide)
    assert [(record.name, record.levelname) for record in caplog.records] == [("sparsecnx", "INFO")] * 3
    assert caplog.messages == [
        f"float64 on cpu: {operator.explain(x)}",
        f"bfloat16 on cpu: {operator.explain(x)}",
        f"float64 on cpu: {operator.explain(wide)}",
    ]


def test_the_log_breaks_no_graph(caplog: pytest.LogCaptureFixture, x: SparseTensor) -> None:
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, logger="sparsecnx")
    gamma, beta = draw(CHANNELS), draw(CHANNELS)

    def run(features: torch.Tensor) -> torch.Tensor:
        return ops.grn(x.with_features(features), gamma, beta).features

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x.features)
    assert not [record for record in caplog.records if record.name == "sparsecnx"]
    assert_close(compiled, run(x.features))
    assert [record.levelname for record in caplog.records if record.name == "sparsecnx"] == ["INFO"]


def test_compute_capability_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refusal asks a GPU while torch.compile traces an operator."""
    torch._dynamo.reset()
    monkeypatch.setattr(triton_launch, "available", True)
    monkeypatch.setattr(triton_launch, "interpreting", False)
    for capability, expected in (((9, 0), 1.0), ((7, 5), 0.0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def runs(value: torch.Tensor) -> torch.Tensor:
            return value + 1 if triton_launch.refusal(torch.device("cuda", 0)) is None else value

        assert runs(torch.zeros(())).item() == expected


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        ("8.0;9.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 9), (9, 0)], [(7, 5)]),
        ("9.0a 8.0", [(9, 0), (8, 6)], [(10, 0), (9, 1)]),
        ("10.0f,12.0", [(10, 0), (12, 1)], [(10, 3), (9, 0)]),
        ("", [], [(9, 0)]),
    ],
    ids=str,
)
def test_gpus_that_an_architecture_serves(
    architectures: str, served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    assert [gpu for gpu in (*served, *refused) if cuda.serves(architectures, gpu)] == served


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, tuple[int, int]], None]]:
    """As on a GPU of some compute capability with operators built for some architectures."""

    def install(architectures: str, capability: tuple[int, int]) -> None:
        cuda._unserved.cache_clear()
        monkeypatch.setattr(compiled, "cuda_loaded", True)
        facts = {"cuda": "13.0", "cuda_architectures": architectures}
        monkeypatch.setattr(compiled, "build_info", lambda: facts)
        monkeypatch.setattr(cuda, "driver_version", lambda: (13, 0))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    yield install
    cuda._unserved.cache_clear()


def test_cuda_refuses_a_driver_that_is_too_old(
    built: Callable[[str, tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    built("8.0;9.0+PTX", (9, 0))
    device = torch.device("cuda", 0)
    assert cuda.refusal(device) is None
    cuda._unserved.cache_clear()
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 8))
    assert cuda.refusal(device) == "CUDA operators are built with CUDA 13.0, the driver is for CUDA 12.8"


def test_cuda_says_why_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, built: Callable[[str, tuple[int, int]], None]
) -> None:
    gpu = torch.device("cuda", 0)
    built("8.0;9.0+PTX", (9, 0))
    assert cuda.refusal(gpu) is None
    built("8.0;9.0", (12, 0))
    reason = "CUDA operators are built for 8.0;9.0, cuda:0 has compute capability 12.0"
    assert cuda.refusal(gpu) == reason
    monkeypatch.setattr(compiled, "cuda_loaded", False)
    monkeypatch.setattr(compiled, "cuda_why_not", "this torch is built for CPU only")
    assert cuda.refusal(gpu) == "this torch is built for CPU only"


def test_architectures_break_no_graph(built: Callable[[str, tuple[int, int]], None]) -> None:
    """What a refusal asks of GPU and build while torch.compile traces an operator."""
    for capability, expected in (((9, 0), 1.0), ((7, 5), 0.0)):
        built("8.0;9.0", capability)
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def runs(value: torch.Tensor) -> torch.Tensor:
            return value + 1 if cuda.refusal(torch.device("cuda", 0)) is None else value

        assert runs(torch.zeros(())).item() == expected


@pytest.mark.parametrize("operator", ["convnextv2_block", "depthwise_conv", "grn"])
def test_cuda_runs_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    monkeypatch.setattr(cuda, "emulated", False)
    x = random_sparse(example_layout(), CHANNELS, torch.float32)
    message = f"backend 'cuda' cannot run {operator}: CUDA operators run on a GPU, x is on cpu"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        dispatcher(operator).choose(x)


@needs_cuda
@needs_triton
def test_cuda_says_what_it_does_not_take(volume: SparseTensor) -> None:
    x, volume = (move(value, DEVICE) for value in (random_sparse(example_layout(), CHANNELS), volume))
    for operator in (depthwise_conv, grn, convnextv2_block):
        assert operator.refusal("cuda", x) == "CUDA kernels take float32, bfloat16 and float16, x is torch.float64"
    for operator in (depthwise_conv, convnextv2_block):
        assert operator.refusal("cuda", volume) == "CUDA kernel is two-dimensional, x has 3 spatial dimensions"
    with use_backend("cuda"):
        assert grn.choose(volume.to(torch.float32)) == "cuda"
        for channels in (0, 2**16 + 1):
            wide = x.with_features(x.features.new_empty(x.layout.rows, channels, dtype=torch.float32))
            assert grn.refusal("cuda", wide) == f"CUDA kernels take 1 to 65536 channels, x has {channels}"


@needs_cuda
def test_a_block_on_cuda_needs_triton_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "available", False)
    x = move(random_sparse(example_layout(), CHANNELS, torch.float32), DEVICE)
    message = "convnextv2_block: all but its depthwise steps are Triton's: Triton is not installed"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        convnextv2_block.choose(x)


@needs_cuda
@needs_cpu
@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the emulator")
def test_the_emulator_is_taken_only_when_asked_for_by_name(x: SparseTensor) -> None:
    x = x.to(torch.float32)
    for operator in (depthwise_conv, grn, convnextv2_block):
        assert operator.choose(x) == "cpu"
        assert operator.explain(x).reasons["cuda"] == "CUDA operators run on a GPU, x is on cpu"
        with use_backend("cuda"):
            assert operator.choose(x) == "cuda"


@needs_triton
def test_triton_says_what_it_does_not_take(volume: SparseTensor) -> None:
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"take float32, bfloat16 and float16, x is torch\.float64"):
            CALLS["depthwise_conv"](random_sparse(example_layout(), CHANNELS))
        with pytest.raises(BackendError, match="Triton kernel is two-dimensional, x has 3 spatial dimensions"):
            CALLS["depthwise_conv"](volume)


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "available", True)
    monkeypatch.setattr(triton_launch, "interpreting", False)
    x = random_sparse(example_layout(), CHANNELS, torch.float32)
    with use_backend("triton"), pytest.raises(BackendError, match=r"x is on cpu \(on the CPU under TRITON_INTERPRET=1"):
        depthwise_conv.choose(x)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "available", False)
    x = random_sparse(example_layout(), CHANNELS, torch.float32)
    with use_backend("triton"), pytest.raises(BackendError, match="cannot run depthwise_conv: Triton is not installed"):
        depthwise_conv.choose(x)


@needs_cpu
def test_auto_prefers_native_on_the_cpu_also_in_the_interpreter(x: SparseTensor) -> None:
    choice = depthwise_conv.explain(x.to(torch.float32))
    assert choice.backend == "cpu"
    assert list(choice.reasons) == ["cpu", "triton", "cuda", "reference", "minkowski"]
    assert "only when asked for by name" in choice.reasons["triton"]
