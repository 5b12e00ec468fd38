"""Which of CUDA and Triton `auto` takes on a GPU, from tables of measurements of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import dispatcher, example_layout, random_sparse

from sparsecnx import SparseTensor, choices, layout, ops, use_backend
from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.choices import Comparison, Measurement, compare

GPU = "NVIDIA H200"
CONVOLUTION = ("depthwise_conv", "depthwise_conv", "depthwise_conv_weight_grad")


@pytest.fixture(autouse=True)
def own_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on an H200, whatever is here; nothing is remembered from one table to the next."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    choices._compare.cache_clear()
    yield
    choices._compare.cache_clear()


def measured(step: str = "depthwise_conv", *, triton: float, cuda: float, **others: Any) -> Measurement:
    facts: dict[str, Any] = {
        "gpu": GPU,
        "capability": (9, 0),
        "date": "2026-01-31",
        "dtype": torch.bfloat16,
        "channels": 96,
        "tile": 8,
        "kernel": (7, 7),
        "rows": 1000,
    }
    return Measurement(step=step, triton_ms=triton, cuda_ms=cuda, **(facts | others))


def ask(
    steps: tuple[str, ...] = ("depthwise_conv",),
    channels: int = 96,
    tile: int | None = 8,
    kernel: tuple[int, ...] = (7, 7),
    dtype: torch.dtype = torch.bfloat16,
) -> Comparison:
    return compare(steps, torch.device("cuda", 0), dtype, channels, tile, kernel)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*entries: Measurement) -> None:
        monkeypatch.setattr(choices, "_measurements", entries)
        choices._compare.cache_clear()

    return put


def test_the_table_that_is_shipped_can_be_read() -> None:
    assert all(isinstance(entry, Measurement) for entry in choices.read(choices.PATH))


def test_where_nothing_is_measured_it_is_triton(table: Callable[..., None]) -> None:
    table()
    assert ask() == Comparison("triton", False, f"no measurement on this GPU, {GPU}: Triton")
    table(measured(triton=2.0, cuda=1.0, capability=(8, 0), gpu="NVIDIA A100-SXM4-80GB"))
    assert ask() == Comparison("triton", False, f"no measurement on this GPU, {GPU}: Triton")


def test_the_faster_is_taken_and_the_ratio_said(table: Callable[..., None]) -> None:
    table(measured(triton=2.0, cuda=1.62))
    assert ask() == Comparison("cuda", True, f"measured 0.81 of Triton's time at C=96, tile 8, 7x7 on {GPU}")
    table(measured(triton=1.0, cuda=2.0))
    assert ask() == Comparison("triton", True, f"measured 0.50 of CUDA's time at C=96, tile 8, 7x7 on {GPU}")
    table(measured(triton=1.0, cuda=1.0))
    assert ask().backend == "triton"


def test_an_operator_is_chosen_by_the_sum_of_its_steps(table: Callable[..., None]) -> None:
    forward = measured(triton=1.0, cuda=1.5)
    table(forward, measured("depthwise_conv_weight_grad", triton=3.0, cuda=1.9))
    assert ask(CONVOLUTION).backend == "cuda"  # 4.9 against 5 milliseconds
    table(forward, measured("depthwise_conv_weight_grad", triton=3.0, cuda=2.1))
    assert ask(CONVOLUTION).backend == "triton"  # 5.1 against 5
    table(forward)
    missing = Comparison("triton", False, "no measurement near C=96, tile 8, 7x7 in bfloat16: Triton")
    assert ask(CONVOLUTION) == missing


@pytest.mark.parametrize(
    "other",
    [{"dtype": torch.float16}, {"tile": 4}, {"kernel": (5, 5)}, {"channels": 145}, {"channels": 63}, {"channels": 64}],
    ids=str,
)
def test_another_shape_is_another_matter(table: Callable[..., None], other: dict[str, Any]) -> None:
    table(measured(triton=2.0, cuda=1.0))
    near = ask(**other)
    # 64 channels are within a factor of 1.5 of 96, and as them made of 16-byte accesses; 63 and 145 are not.
    assert near.backend == ("cuda" if other == {"channels": 64} else "triton")
    assert near.measured == (other == {"channels": 64})


def test_rows_that_are_not_whole_accesses_are_measured_apart(table: Callable[..., None]) -> None:
    table(measured(triton=2.0, cuda=1.0), measured(triton=1.0, cuda=2.0, channels=100))
    assert ask(channels=98).backend == ask(channels=100).backend == "triton"
    assert ask(channels=104).backend == "cuda"


def test_the_nearest_measurement_decides(table: Callable[..., None]) -> None:
    table(measured(triton=2.0, cuda=1.0, channels=96), measured(triton=1.0, cuda=2.0, channels=128))
    assert [ask(channels=channels).backend for channels in (96, 104, 112, 120, 128)] == ["cuda"] * 2 + ["triton"] * 3
    assert "at C=96," in ask(channels=104).reason


def test_this_gpu_comes_before_others_then_most_rows_then_the_latest(table: Callable[..., None]) -> None:
    other = measured(triton=1.0, cuda=2.0, gpu="NVIDIA H100", rows=9000, date="2026-05-01")
    table(other)
    assert ask().reason == "measured 0.50 of CUDA's time at C=96, tile 8, 7x7 on NVIDIA H100"
    own = measured(triton=2.0, cuda=1.0, channels=104)
    table(other, own)
    assert ask().backend == "cuda"
    few, many = measured(triton=1.0, cuda=2.0, rows=10), measured(triton=2.0, cuda=1.0, rows=20)
    table(few, many)
    assert ask().backend == "cuda"
    old, new = measured(triton=1.0, cuda=2.0, date="2026-01-01"), measured(triton=2.0, cuda=1.0, date="2026-02-01")
    for entries in ((old, new), (new, old)):
        table(*entries)
        assert ask().backend == "cuda"


def test_operators_ask_for_their_own_steps_and_shape(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = SparseTensor(torch.zeros(example_layout().rows, 96, dtype=torch.bfloat16), example_layout())
    weight = torch.zeros(96, 1, 5, 3)
    block = ops.BlockParameters(weight, *[torch.zeros(1)] * 9)
    asked = {
        "depthwise_conv": ((weight, None), (*CONVOLUTION,), (5, 3)),
        "convnextv2_block": ((block, None), ("depthwise_conv_fused", *CONVOLUTION[1:]), (5, 3)),
        "grn": ((weight, weight), ("grn", "grn_backward"), ()),
    }
    for name, (arguments, steps, kernel) in asked.items():
        rule = dispatcher(name).implementations["cuda"].compare
        assert rule is not None
        for given, size in ((arguments, kernel), ((), (7, 7) if kernel else ())):
            where = {"tile": x.layout.tile if kernel else None, "kernel": size}
            table(*(measured(step, triton=2.0, cuda=1.0, **where) for step in set(steps)))
            assert rule(x, *given).backend == "cuda"
            table(*(measured(step, triton=2.0, cuda=1.0, **where) for step in set(steps) - {steps[-1]}))
            assert not rule(x, *given).measured


def test_geometry_is_one_step_of_its_own(table: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout._cuda, "refusal", lambda device: None)
    shape = {"dtype": torch.float32, "channels": 1, "tile": None, "kernel": ()}
    for cuda, taken in ((1.0, True), (3.0, False)):
        table(measured("geometry", triton=2.0, cuda=cuda, **shape))
        assert layout._takes_cuda(torch.device("cuda", 0), 2) == taken
    table()
    assert not layout._takes_cuda(torch.device("cuda", 0), 2)


def two_ways(asked: list[tuple[Any, ...]] | None = None) -> Operator:
    """An operator on both, which runs anywhere and says where."""

    def rule(x: SparseTensor, *args: Any) -> Comparison:
        if asked is not None:
            asked.append(args)
        return compare(("grn",), x.device, x.dtype, x.features.shape[1])

    return Operator(
        "sum",
        triton=Implementation(lambda x, *_: x.features + 1, always),
        cuda=Implementation(lambda x, *_: x.features + 2, always, compare=rule),
        reference=Implementation(lambda x, *_: x.features, always),
    )


def grn_times(**times: float) -> Measurement:
    return measured("grn", tile=None, kernel=(), dtype=torch.float64, channels=4, **times)


def test_auto_follows_the_table_and_explains_itself(table: Callable[..., None]) -> None:
    asked: list[tuple[Any, ...]] = []
    operator, x = two_ways(asked), random_sparse(example_layout(), 4)
    table(grn_times(triton=2.0, cuda=1.0))
    assert operator.choose(x, 1, 2) == "cuda" and asked == [(1, 2)]
    assert torch.equal(operator(x, 3), x.features + 2)
    reason = f"measured 0.50 of Triton's time at C=4 on {GPU}"
    assert operator.explain(x).reasons == {"triton": "can run, slower", "cuda": reason, "reference": "can run, slower"}

    table(grn_times(triton=1.0, cuda=2.0))
    assert torch.equal(operator(x), x.features + 1)
    reason = f"measured 0.50 of CUDA's time at C=4 on {GPU}"
    assert operator.explain(x).reasons == {"triton": reason, "cuda": "can run, slower", "reference": "can run, slower"}

    table()
    choice = operator.explain(x)
    assert choice.backend == "triton"
    assert choice.reasons["triton"] == f"no measurement on this GPU, {GPU}: Triton"
    assert choice.reasons["cuda"] == "can run, not measured"


def test_what_is_asked_for_by_name_is_not_measured(table: Callable[..., None]) -> None:
    asked: list[tuple[Any, ...]] = []
    operator, x = two_ways(asked), random_sparse(example_layout(), 4)
    table(grn_times(triton=2.0, cuda=1.0))
    for name, added in (("triton", 1), ("cuda", 2), ("reference", 0)):
        with use_backend(name):
            assert torch.equal(operator(x), x.features + added)
            assert operator.explain(x).reasons[name] == "asked for"
    assert not asked


@pytest.mark.parametrize(("missing", "left"), [("triton", "cuda"), ("cuda", "triton")])
def test_where_one_cannot_run_the_other_does(table: Callable[..., None], missing: str, left: str) -> None:
    operator, x = two_ways(), random_sparse(example_layout(), 4)
    rule = operator.implementations[missing]
    operator.implementations[missing] = Implementation(rule.function, lambda _: "not here", compare=rule.compare)
    for times in ({"triton": 2.0, "cuda": 1.0}, {"triton": 1.0, "cuda": 2.0}):
        table(grn_times(**times))
        choice = operator.explain(x)
        assert choice.backend == operator.choose(x) == left
        assert choice.reasons[left] == "the fastest that can run" and choice.reasons[missing] == "not here"


@pytest.mark.parametrize("dynamic", [None, False, True], ids=str)
def test_the_choice_breaks_no_graph(table: Callable[..., None], dynamic: bool | None) -> None:
    """Also where torch.compile leaves the number of channels open."""
    table(grn_times(triton=2.0, cuda=1.0))
    operator, layout = two_ways(), example_layout()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def run(features: torch.Tensor) -> torch.Tensor:
        return operator(SparseTensor(features, layout))

    for channels, added in ((4, 2), (100, 1), (6, 2), (200, 1)):
        assert run(torch.zeros(layout.rows, channels, dtype=torch.float64)).unique().tolist() == [added]


def content() -> dict[str, Any]:
    times = {"step": "grn", "dtype": "float16", "channels": 8, "tile": None, "kernel": [], "rows": 100}
    machine = {
        "gpu": GPU,
        "capability": [9, 0],
        "date": "2026-01-31",
        "torch": "2.14",
        "triton": "3.8",
        "toolkit": "13",
    }
    return {"runs": [{**machine, "times": [{**times, "triton_ms": 1, "cuda_ms": 0.5}]}]}


def test_a_table_is_read(tmp_path: Path) -> None:
    (path := tmp_path / "table.json").write_text(json.dumps(content()))
    assert choices.read(path) == (
        Measurement(GPU, (9, 0), "2026-01-31", "grn", torch.float16, 8, None, (), 100, triton_ms=1, cuda_ms=0.5),
    )


def change(place: str, value: object) -> str:
    """A table with something else in one place, or with nothing there for `...`."""
    whole = content()
    run: Any = whole["runs"][0]
    owner = {"top": whole, "run": run, "times": run["times"][0]}[place.partition(".")[0]]
    if value is ...:
        del owner[place.partition(".")[2]]
    else:
        owner[place.partition(".")[2]] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: "),
        ("[]", ": runs is missing"),
        (change("top.runs", {}), r": runs is \{\}: expected a list"),
        (change("run.gpu", 3), r": runs\[0\]\.gpu is 3: expected a string"),
        (change("run.toolkit", ...), r": runs\[0\]\.toolkit is missing"),
        (change("run.capability", [9]), r": runs\[0\]\.capability is \(9,\): expected \[major, minor\]"),
        (change("run.capability", ["9", 0]), r"\.capability is \['9', 0\]: expected integers from 0 on"),
        (change("times.step", "conv"), r": runs\[0\]\.times\[0\]\.step is 'conv': expected one of depthwise_conv, "),
        (change("times.dtype", "float64"), r"\.dtype is 'float64': expected one of float32, bfloat16, float16"),
        (change("times.channels", 0), r"\.channels is 0: expected 1 or more"),
        (change("times.channels", 8.5), r"\.channels is 8\.5: expected an integer"),
        (change("times.channels", True), r"\.channels is True: expected an integer"),
        (change("times.tile", "8"), r"\.tile is '8': expected an integer or null"),
        (change("times.tile", ...), r"\.tile is missing"),
        (change("times.kernel", [7, 0]), r"\.kernel is \[7, 0\]: expected integers from 1 on"),
        (change("times.rows", None), r"\.rows is None: expected an integer"),
        (change("times.cuda_ms", 0), r"\.cuda_ms is 0: expected a positive time"),
        (change("times.triton_ms", float("nan")), r"\.triton_ms is nan: expected a positive time"),
        (change("times.triton_ms", float("inf")), r"\.triton_ms is inf: expected a positive time"),
        (change("times.triton_ms", "1"), r"\.triton_ms is '1': expected a number"),
    ],
)
def test_a_malformed_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=rf"table\.json{message}" if message[0] == ":" else message) as error:
        choices.read(path)
    assert str(path) in str(error.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        choices.read(tmp_path / "none.json")
