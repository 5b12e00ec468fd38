"""benchmarks/encoder.py: a real run at a small setting, and what it refuses."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import Size

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ["--size", "atto", "--image", "64", "--batch", "2", "--ratio", "0.5", "--threads", "1"]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module, with the fewest channels; threads as they were afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(SIZES, "atto", Size((1, 1, 1, 1), (8, 8, 16, 16)))
    yield importlib.import_module("encoder")
    torch.set_num_threads(threads)


@pytest.fixture
def small(encoder: ModuleType) -> Any:
    """A case of that size."""
    return encoder.selected_cases(encoder.parse(SMALL))[0]


def test_run_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "results" / "encoder.json"
    script = [sys.executable, "-W", "ignore", str(BENCHMARKS / "encoder.py")]
    options = [*SMALL, "--no-compile", "--repeats", "3", "--out", str(out)]
    done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    content = json.loads(out.read_text())
    (key, case), (run, facts) = *content["cases"].items(), *content["runs"].items()
    assert key == "atto-mask0.5-batch2-64px-float32-cpu-1threads"
    assert (case["visible"], case["patches"], case["run"]) == (2, 4, run)
    assert facts["command"].startswith("python benchmarks/encoder.py --size atto")
    assert facts["machine"]["cores"] >= 1
    assert facts["versions"]["torch"] == torch.__version__
    assert set(case["errors"]) == {"sparse", "dense"}
    assert 0 < case["errors"]["sparse"]["gradient"] < 1e-4
    for mode in ("forward", "forward_backward"):
        assert set(case["ms"][mode]) == {"sparse", "dense", "floor"}
        for times in case["ms"][mode].values():
            assert len(times["repeats"]) == 3
            assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= max(times["repeats"])
    for memory in (case["saved_bytes"], case["peak_bytes"]):
        assert 0 < memory["sparse"] < memory["dense"]
    assert case["saved_bytes"]["dense"] < case["peak_bytes"]["dense"]
    assert "atto, mask 0.5, batch 2, 64 px" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_wrong_model_is_refused(encoder: ModuleType, small: Any) -> None:
    workload = encoder.Workload(small, ["sparse", "dense"])
    workload.check()
    gamma = workload.sparse_model.stages[2][0].grn.gamma
    with torch.no_grad():
        gamma.mul_(1.01)
    with pytest.raises(encoder.Mismatch, match=r"sparse and dense in float32 differ in atto-mask0\.5-.*: output"):
        encoder.run_case(workload, repeats=1)
    with torch.no_grad():
        gamma.div_(1.01)
    gamma.register_hook(lambda grad: 1.001 * grad)
    with pytest.raises(encoder.Mismatch, match=r"gradient of stages\.2\.0\.grn\.gamma 1\.0e-03"):
        encoder.run_case(workload, repeats=1)


def test_a_gradient_that_is_nan_or_missing_is_refused(encoder: ModuleType, small: Any) -> None:
    workload = encoder.Workload(small, ["sparse"])
    bias = workload.sparse_model.stages[0][0].dwconv.bias
    handle = bias.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(encoder.Mismatch, match="nan"):
        workload.check()
    handle.remove()
    bias.requires_grad_(False)
    with pytest.raises(encoder.Mismatch, match=r"stages\.0\.0\.dwconv\.bias 1\.0e\+00"):
        workload.check()


def test_mismatch_ends_the_run(
    encoder: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(encoder.TOLERANCE, "float32", 1e-12)
    assert encoder.main([*SMALL, "--no-compile", "--out", str(tmp_path / "out.json")]) == 1
    assert "not timed: sparse and dense in float32 differ" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_compiles_once_for_all_ratios(encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    workload = encoder.Workload(small, ["compiled"])
    for ratio in (0.0, 0.5, 0.7):
        workload.set_ratio(encoder.replace(small, ratio=ratio))
        assert workload.check()["compiled"]["gradient"] < 1e-4
    assert len(compiled) == 1


def test_saved_bytes_are_what_forward_allocates_and_does_not_free(
    encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    workload = encoder.Workload(small)
    workload.check()
    saved = workload.saved_bytes()
    for name in encoder.ENCODERS:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = workload.encode(name)
        events = profiler.profiler.kineto_results.events()
        kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
        assert kept == pytest.approx(saved[name] + out.untyped_storage().nbytes(), abs=1024), name
        del out


def test_floor_is_the_matrix_products_of_the_blocks(encoder: ModuleType, small: Any) -> None:
    workload = encoder.Workload(small, [])
    rows = [4 * 64, 4 * 16, 4 * 4, 4]  # two images with two visible tiles each
    product = sum(2 * count * 4 * channels**2 for count, channels in zip(rows, SIZES["atto"].dims, strict=True))
    for backward, products in ((False, 2), (True, 6)):
        with FlopCounterMode(display=False) as counter:
            workload.floor(backward)
        assert counter.get_total_flops() == products * product


def test_variants_take_turns(encoder: ModuleType) -> None:
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    times = encoder.measure.interleaved(calls, 2, torch.device("cpu"), before=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * (encoder.measure.WARM_UP + 2)
    assert [len(repeats) for repeats in times.values()] == [2, 2]


def test_sweeps(encoder: ModuleType) -> None:
    def keys(*arguments: str) -> list[tuple[Any, ...]]:
        cases = encoder.selected_cases(encoder.parse(arguments))
        return [(case.size, case.image, case.batch, case.ratio) for case in cases]

    assert keys() == [("atto", 224, 8, 0.6), ("tiny", 224, 8, 0.6)]
    assert keys("--sweep", "ratio", "--size", "pico") == [
        ("pico", 224, 8, ratio) for ratio in (0.0, 0.25, 0.5, 0.6, 0.75, 0.9)
    ]
    everything = keys("--sweep", "all", "--size", "atto")
    assert len(everything) == len(set(everything)) == 1 + 2 + 5 + 4 + 2
    shapes = [case[:3] for case in everything]
    changes = sum(a != b for a, b in itertools.pairwise(shapes))
    assert changes == len(set(shapes)) - 1, "cases that share compiled code come one after another"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--image", "100"], "--image is 100: expected a multiple of 32"),
        (["--ratio", "1.0"], "ratio is 1.0: expected 0 <= ratio < 1"),
        (["--ratio", "0.9", "--image", "64"], "ratio is 0.9: it leaves none of the 4 patches visible"),
        (["--batch", "0"], "--batch is [0]: expected 1 or more"),
        (["--size", "small"], "invalid choice: 'small'"),
        (["--plot", "plots"], "--plot draws what --out holds: give both"),
    ],
)
def test_bad_options(
    encoder: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit):
        encoder.parse(arguments)
    assert complaint in capsys.readouterr().err


def test_results_file_keeps_other_cases(encoder: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = encoder.Results(path)
    first.run = "first"
    first.add("a", {"value": 1})
    first.add("b", {"value": 1})
    second = encoder.Results(path)
    second.run = "second"
    second.add("a", {"value": 2})
    content = json.loads(path.read_text())
    assert content["cases"] == {"a": {"run": "second", "value": 2}, "b": {"run": "first", "value": 1}}
    assert set(content["runs"]) == {"first", "second"}
    second.add("b", {"value": 2})
    assert set(json.loads(path.read_text())["runs"]) == {"second"}


def test_plots(encoder: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    cases = []
    for case in encoder.selected_cases(encoder.parse([*SMALL, "--ratio", "0", "0.5"])):
        workload = encoder.Workload(case, ["sparse", "dense"])
        memory = {"saved_bytes": workload.saved_bytes(), "peak_bytes": workload.saved_bytes()}
        where = {"visible": case.visible, "patches": 4}
        cases.append({**encoder.asdict(case), **where, **memory, "ms": workload.time(1)})
    names = ["encoder-ratio.png", "encoder-size.png", "encoder-memory.png"]
    assert [path.name for path in encoder.report.plot(cases, tmp_path)] == names
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    table = encoder.report.tables(cases).splitlines()
    assert len(table) == 2 * (1 + 2 * len(cases)) + 1


def test_code_for_minkowski_is_timed_beside_our_own(encoder: ModuleType, tmp_path: Path) -> None:
    benchmark = importlib.import_module("minkowski_encoder")
    out = tmp_path / "minkowski.json"
    options = ["--size", "atto", "--image", "64", "--batch", "2", "--ratio", "0.5", "--threads", "1", "--repeats", "2"]
    assert benchmark.main([*options, "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"].values()
    assert {"api", "api_general", "fused", "fused_sample", "floor"} <= set(case["ms"]["encoder"])
    assert {"api", "api_general"} <= set(case["ms"]["depthwise"])
    assert all(0 < error["largest"] < 1e-4 for error in case["errors"].values())


def test_code_for_minkowski_that_computes_something_else_is_not_timed(
    encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module("minkowski_encoder")
    workload = benchmark.Workload(small)
    with torch.no_grad():
        workload.models["api"].stages[1][0].grn.gamma.mul_(1.01)
    with pytest.raises(encoder.Mismatch, match="api and fused differ"):
        workload.check()
