"""benchmarks/gpu_suite.sh and what it runs, as far as that shows without a GPU."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import DEVICE, needs_cuda
from torch import Tensor

from sparsecnx import Layout, SparseTensor, choices, ops, use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.selection import selected
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import Size
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SMALL = ["--device", "cpu", "--size", "atto", "--image", "64", "--ratio", "0.5", "--batch", "2"]

needs_triton = pytest.mark.skipif(not triton_launch.available, reason="needs Triton")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a benchmark as a module; atto has the fewest channels."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(SIZES, "atto", Size((1, 1, 1, 1), (8, 8, 16, 16)))
    yield importlib.import_module


# The suite, with a Python that plays the parts.

FAKE = """#!/usr/bin/env bash
# Instead of Python: a part does what FAKE_<part> says, all else is done by the real one.
case $1 in
  benchmarks/gpu_summary.py) exec "$REAL" "$@" ;;
  benchmarks/gpu_parity.py) part=parity; [[ $* == *"--backend cuda"* ]] && part=cuda ;;
  benchmarks/choices.py) part=choices ;;
  benchmarks/launch_overhead.py) part=overhead ;;
  benchmarks/encoder_step.py) part=encoder ;;
  benchmarks/fcmae_step.py) part=fcmae ;;
  benchmarks/minkowski_encoder.py) part=minkowski ;;
  benchmarks/kernels.py) part=kernels ;;
  setup.py) part=build ;;
  -m) part=tests ;;
  -c)
    case $2 in
      *properties*) echo "a fake GPU, capability 9.0; Python"; exit ;;
      *cuda_loaded*) eval "${FAKE_operators:-echo yes}"; exit ;;
      *zipfile*) echo "${@: -1}" >>"$0.unpacked"; exit ;;
      *xdist*) exit 1 ;;
      *) exec "$REAL" "$@" ;;
    esac ;;
esac
echo "$part got $*"
todo=FAKE_$part
eval "${!todo:-true}"
"""


class Suite:
    """Runs gpu_suite.sh with `FAKE` for Python."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.python = folder / "python"
        self.python.write_text(FAKE)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        # A compute-sanitizer that runs what it is given.
        tool = self.python.with_name("compute-sanitizer")
        tool.write_text('#!/usr/bin/env bash\necho "$2 with ${*:3}"\n')
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PYTHON": str(self.python), "REAL": sys.executable, "PATH": path, **environment}
        command = ["bash", str(BENCHMARKS / "gpu_suite.sh"), str(self.out)]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    def statuses(self) -> dict[str, str]:
        lines = (self.out / "parts.tsv").read_text().splitlines()
        return {name: status for name, status, *_ in (line.split("\t") for line in lines)}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_all_parts_run_in_turn_within_the_limits_on_what_comes_back(suite: Suite) -> None:
    done = suite.run()
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["machine", "parity", "build", "cuda", "kernels", "choices", "encoder", "overhead", "fcmae"]
    names += ["minkowski", "memcheck", "racecheck", "tests"]
    assert suite.statuses() == dict.fromkeys(names, "ok")
    assert {path.name for path in suite.out.iterdir()} == {"log.txt", "parts.tsv", "summary.md", "gpu_choices.json"}
    assert (suite.out / "gpu_choices.json").read_text() == choices.PATH.read_text()
    out = str(suite.out.resolve())
    assert f"parity got benchmarks/gpu_parity.py --seconds 105 --out {out}/parity.json" in done.stdout
    assert f"cuda got benchmarks/gpu_parity.py --backend cuda --seconds 45 --out {out}/parity-cuda.json" in done.stdout
    assert "racecheck with " in done.stdout
    assert "tests got -m pytest" in done.stdout
    summary = (suite.out / "summary.md").read_text()
    assert "| machine | ok | " in summary
    assert "a fake GPU" in summary
    assert done.stdout.splitlines()[-1].endswith("summary.md")


def test_a_part_that_fails_stops_no_other_and_is_not_forgotten(suite: Suite) -> None:
    done = suite.run(FAKE_parity="echo oh; exit 1", FAKE_kernels="exit 3", FAKE_encoder="kill -9 $$")
    assert done.returncode == 1
    found = suite.statuses()
    assert (found["parity"], found["kernels"]) == ("failed", "incomplete")
    assert found["encoder"] != "ok"
    assert (found["fcmae"], found["tests"]) == ("ok", "ok")
    assert "oh" in (suite.out / "log.txt").read_text()


def test_without_a_compiler_it_goes_on_and_says_so(suite: Suite) -> None:
    done = suite.run(FAKE_build="echo 'error: no C++ compiler: found none of c++'; exit 1")
    assert done.returncode == 1
    assert suite.statuses()["build"] == "failed"
    assert suite.statuses()["kernels"] == "ok"
    assert "exit code 1; error: no C++ compiler" in done.stdout


def test_without_nvcc_parts_of_cuda_fail_and_the_others_go_on(suite: Suite) -> None:
    done = suite.run(FAKE_operators="echo 'no nvcc found'")
    assert done.returncode == 1
    found = suite.statuses()
    assert [name for name, status in found.items() if status != "ok"] == [
        "build",
        "cuda",
        "choices",
        "memcheck",
        "racecheck",
    ]
    assert "without CUDA operators: no nvcc found" in done.stdout
    assert "kernels got benchmarks/kernels.py --backend triton " in done.stdout


def test_a_wheel_that_was_brought_along_stands_in_for_nvcc(suite: Suite, request: pytest.FixtureRequest) -> None:
    wheel = ROOT / "build" / "sparsecnx-test-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.touch()
    request.addfinalizer(wheel.unlink)
    done = suite.run(FAKE_operators='if [[ -e $0.unpacked ]]; then echo yes; else echo "no nvcc found"; fi')
    assert suite.statuses()["build"] == "ok"
    assert "compiling them here failed: no nvcc found" in done.stdout
    assert suite.statuses()["cuda"] == "ok"
    assert done.returncode == 0, done.stdout


MEASURED = {"step": "grn", "dtype": "bfloat16", "channels": 384, "tile": None, "kernel": [], "rows": 100}
MEASURED |= {"triton_ms": 0.2, "cuda_ms": 0.1}


@pytest.mark.parametrize(
    ("part", "said", "kept"),
    [
        ("true", "ok", True),
        ("exit 3", "incomplete", True),
        ("exit 1", "failed", False),
        ("kill -9 $$", "timeout", False),
        ("echo '{}' >$OUT", "failed", False),
    ],
)
def test_measured_choices_are_added_to_those_that_are_shipped(
    load: Any, suite: Suite, tmp_path: Path, part: str, said: str, kept: bool
) -> None:
    """In a copy of what the suite needs, so that this one keeps its own; `part` is what follows the measuring."""
    copy = tmp_path / "copy"
    (copy / "sparsecnx" / "data").mkdir(parents=True)
    for path in (ROOT / "sparsecnx").iterdir():
        if path.name != "data":
            (copy / "sparsecnx" / path.name).symlink_to(path)
    shutil.copytree(BENCHMARKS, copy / "benchmarks")
    save, shipped = load("choices").save, copy / "sparsecnx" / "data" / "gpu_choices.json"
    save(shipped, _run("2026-01-01", MEASURED))
    before = shipped.read_text()
    suite.out.mkdir()
    save(suite.out / "gpu_choices.json", _run("1999-01-01", MEASURED))  # of an earlier suite
    run = json.dumps(_run("2026-01-02", MEASURED))
    program = ["import json, pathlib, sys", "sys.path.insert(0, 'benchmarks')", "import choices"]
    program += [f"choices.save(pathlib.Path(sys.argv[1]), json.loads({run!r}))"]
    (tmp_path / "measure.py").write_text("\n".join(program))
    do = f'OUT="${{@: -1}}"; "$REAL" "{tmp_path}/measure.py" "$OUT"; {part}'
    command = ["bash", str(copy / "benchmarks" / "gpu_suite.sh"), str(suite.out)]
    environment = {"FAKE_choices": do, "SPARSECNX_SUITE_PARTS": "choices"}
    variables = {**os.environ, "PYTHON": str(suite.python), "REAL": sys.executable, **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert suite.statuses()["choices"] == said, done.stdout + done.stderr
    assert done.returncode == (said != "ok")
    if kept:
        assert [one.date for one in choices.read(shipped)] == ["2026-01-01", "2026-01-02"]
    else:
        assert shipped.read_text() == before


def test_time_that_runs_out_ends_a_part_and_the_rest(suite: Suite) -> None:
    begin = time.monotonic()
    done = suite.run(SPARSECNX_SUITE_SECONDS="6", SPARSECNX_SUITE_PARTS="parity kernels", FAKE_parity="sleep 40")
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert suite.statuses() == {"machine": "ok", "parity": "timeout", "kernels": "timeout"}
    assert "no time was left" in done.stdout


def test_no_pytest_is_said(suite: Suite) -> None:
    found = suite.python.read_text().replace("*xdist*) exit 1 ;;", "*find_spec*) echo hypothesis; exit ;;")
    suite.python.write_text(found)
    done = suite.run(SPARSECNX_SUITE_PARTS="tests")
    assert done.returncode == 0
    assert suite.statuses()["tests"] == "skipped"
    assert "not installed: hypothesis" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_said_at_once(suite: Suite) -> None:
    done = suite.run(PYTHON=sys.executable)
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


@needs_triton
def test_a_part_runs_for_real_at_toy_sizes(suite: Suite) -> None:
    done = suite.run(PYTHON=sys.executable, SPARSECNX_SUITE_DEVICE="cpu", SPARSECNX_SUITE_PARTS="kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert suite.statuses()["kernels"] == "ok"
    (case,) = json.loads((suite.out / "kernels.json").read_text())["cases"].values()
    assert {kernel["name"] for kernel in case["kernels"]} >= {"layer_norm_kernel", "layer_norm_backward_kernel"}
    assert "| layer_norm_kernel | 1 | " in (suite.out / "summary.md").read_text()


# Processes of their own.


def _answer(value: int) -> int:
    return value + 1


def _raise() -> None:
    raise ValueError("wrong\nin two lines")


def test_outcomes(load: Any) -> None:
    isolated = load("isolated")
    tasks = [
        isolated.Task("answer", _answer, (1,)),
        isolated.Task("raise", _raise),
        isolated.Task("die", _die),
        isolated.Task("hang", time.sleep, (60,), seconds=0.5),
        isolated.Task("after", _answer, (2,)),
    ]
    found = {outcome.task.name: outcome for outcome in isolated.outcomes(tasks)}
    assert list(found) == ["answer", "raise", "die", "hang", "after"]
    assert [outcome.status for outcome in found.values()] == ["done", "failed", "failed", "timeout", "done"]
    assert (found["answer"].value, found["after"].value) == (2, 3)
    assert isolated.last_line(found["raise"].error) == "ValueError: wrong"
    assert "signal 9" in found["die"].error


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_outcomes_of_several_at_a_time_and_a_deadline(load: Any) -> None:
    isolated = load("isolated")
    begin = time.monotonic()
    tasks = [isolated.Task(str(index), time.sleep, (0.5,)) for index in range(4)]
    tasks += [isolated.Task("slow", time.sleep, (60,)), isolated.Task("never", time.sleep, (0,))]
    found = {o.task.name: o.status for o in isolated.outcomes(tasks, jobs=2, deadline=begin + 2.5)}
    assert time.monotonic() - begin < 10
    assert [found[str(index)] for index in range(4)] == ["done"] * 4
    assert found["slow"] == "timeout"
    assert found["never"] == "done"  # beside the slow one


# Costs.


@needs_triton
def test_every_kernel_has_a_cost(load: Any) -> None:
    costs = load("kernel_costs").COSTS
    assert costs.keys() >= load("launches").entry_points()
    sources = "".join(path.read_text() for path in (ROOT / "sparsecnx").rglob("*.py"))
    assert [name for name in costs if f"def {name}(" not in sources] == []


@needs_triton
def test_costs_of_a_block_add_up(load: Any) -> None:
    """At the first stage of Tiny: rows of C values and of 4C, and products of rows x C x 4C."""
    costs, launches = load("kernel_costs"), load("launches")
    setting = launches.Setting("tiny", "1", "bfloat16")
    rows, channels = setting.rows, setting.channels
    found: list[tuple[str, Any]] = []

    def observe(kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        found.append((costs.bound(kernel, arguments, options)[0], costs.cost(kernel, arguments, options)))

    def traced(program: str) -> dict[str, Any]:
        found.clear()
        with triton_launch.observing(observe), use_backend("triton"), launches.WithoutComputing():
            launches.programs(setting)[program]()
        assert len(found) > 5
        return {"matrix": sum(cost.matrix for _, cost in found), "by name": dict(found)}

    product = 2 * rows * channels * 4 * channels
    kept, again = traced("convnextv2_block"), traced("convnextv2_block, recompute")
    # Forward two; backward t, and where a is recomputed both of them in both passes. The other three are torch.mm's.
    assert kept["matrix"] == 3 * product
    assert again["matrix"] == 6 * product
    narrow, wide = 2 * rows * channels, 2 * rows * 4 * channels  # bytes
    forward = again["by name"]["linear_gelu_kernel"].bytes
    assert narrow + wide < forward < 1.1 * (narrow + wide)
    assert kept["by name"]["linear_gelu_kernel"].bytes - forward == wide
    second = kept["by name"]["linear_scaled_kernel"].bytes
    assert 2 * narrow + wide < second < 1.1 * (2 * narrow + wide)
    gradients = kept["by name"]["hidden_backward_kernel"].bytes  # the last of its launches
    assert 4 * wide < gradients < 1.2 * 4 * wide


@pytest.mark.parametrize("tile", [1, 2, 4, 7])
def test_active_taps_are_the_products_of_a_convolution(load: Any, tile: int) -> None:
    mask = torch.rand(2, 3, 4) < 0.5
    mask[0, 0, 0] = False
    layout = Layout.from_mask(mask, (3 * tile, 4 * tile))
    ones = SparseTensor(torch.ones(layout.rows, 1, dtype=torch.float64), layout)
    with use_backend("reference"):
        products = ops.depthwise_conv(ones, torch.ones(1, 1, 7, 5, dtype=torch.float64)).features.sum()
    table = neighbour_table(layout, (7, 5))
    assert load("kernel_costs").active_taps(table, tile, (7, 5)) == int(products)


def test_the_floor_is_the_largest_of_three(load: Any) -> None:
    kernels, costs = load("kernels"), load("kernel_costs")
    rates = {"copy_bytes_per_s": 1e12, "matrix_flops_per_s": 1e14, "vector_flops_per_s": 1e13}
    assert kernels.floor(costs.Cost(10**9, 10**10, 10**9), rates) == (pytest.approx(1.0), "bytes")
    assert kernels.floor(costs.Cost(10**9, 10**12, 10**9), rates) == (pytest.approx(10.0), "matrix")
    assert kernels.floor(costs.Cost(10**9, 10**10, 10**11), rates) == (pytest.approx(10.0), "vector")


@needs_triton
def test_a_recording_holds_all_that_runs_and_can_run_it_again(load: Any) -> None:
    kernels = load("kernels")
    layout = Layout.from_mask(torch.zeros(1, 2, 2, dtype=torch.bool, device=DEVICE), (2, 2))
    with DEVICE:
        features = torch.randn(layout.rows, 8, requires_grad=True)
        weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
        matrix = torch.randn(8, 4)
    seen: list[Tensor] = []

    def run() -> None:
        out = ops.layer_norm(SparseTensor(features, layout), weight, bias).features
        seen.append(out.detach())
        (out @ matrix).sum().backward()

    with use_backend("triton"):
        calls = kernels.record(run)
    names = [launch.name for launch in calls]
    assert names.index("layer_norm_kernel") < names.index("torch.mm") < names.index("layer_norm_backward_kernel")
    by_name = {launch.name: launch for launch in calls}
    assert by_name["torch.mm"].cost.matrix == 2 * 4 * 8 * 4
    assert "4x8 8x4" in {launch.text for launch in calls if launch.name == "torch.mm"}
    assert (by_name["layer_norm_kernel"].phase, by_name["layer_norm_backward_kernel"].phase) == ("forward", "backward")
    expected = seen[0].clone()
    seen[0].zero_()
    by_name["layer_norm_kernel"].call()
    assert torch.equal(seen[0], expected)


def test_every_cuda_operator_has_a_cost(load: Any) -> None:
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text().partition("sparsecnx_cuda, m")[2])
    registered = re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "cuda" / "implement.h").read_text())
    costs = load("kernel_costs").CUDA_COSTS
    assert costs.keys() == set(registered)
    assert costs.keys() <= set(schemas)


@pytest.mark.parametrize("shape", [(8, 8), (2, 5), (1, 1)])
def test_flops_of_a_dense_depthwise_convolution(load: Any, shape: tuple[int, int]) -> None:
    ones = torch.ones(2, 3, *shape, dtype=torch.float64)
    weight = torch.ones(3, 1, 7, 5, dtype=torch.float64)
    products = torch.nn.functional.conv2d(ones, weight, padding=(3, 2), groups=3).sum()
    assert load("kernel_costs").dense_depthwise_conv(2, 3, shape, (7, 5)) == 2 * int(products)


def test_the_dense_depthwise_convolution_is_torchs_own(load: Any) -> None:
    """Its three calls against autograd, on as many images as come close to the visible rows."""
    kernels = load("kernels")
    case = {"channels": 4, "tile": 2, "image": 128, "ratio": 0.5, "dtype": "float32", "device": "cpu"}
    forward, grad_x, grad_weight = kernels.dense_depthwise_conv(case, 3)
    x, weight, bias = (value.detach() for value in forward.call.args[:3])
    grad = grad_x.call.args[0]
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    out = torch.nn.functional.conv2d(*leaves, padding=3, groups=4)
    expected = torch.autograd.grad(out, leaves[:2], grad)
    torch.testing.assert_close(forward.call(), out.detach())
    torch.testing.assert_close(grad_x.call()[0], expected[0])
    torch.testing.assert_close(grad_weight.call()[1], expected[1])
    rates = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e9, "vector_flops_per_s": 1e9}
    equal, whole = kernels.measure_dense(case, 4, torch.device("cpu"), rates)
    assert (equal["sites"], whole["sites"], equal["rows"]) == (2 * 64, 4 * 64, 4 * 8 * 4)


TINY = {"size": "atto", "image": 64, "ratio": 0.5, "channels": 8, "tile": 2, "stage": 3, "dtype": "float32"}


@needs_cuda
@needs_triton
@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        ("depthwise_conv", {"cuda.depthwise_conv": "depthwise_conv_kernel"}),
        ("grn", {"cuda.grn": None, "cuda.grn_backward": None}),
        ("gather", {"cuda.gather_tiles": "gather_kernel", "cuda.scatter_tiles": "scatter_kernel"}),
        ("scatter", {"cuda.scatter_tiles": "scatter_kernel", "cuda.gather_tiles": "gather_kernel"}),
    ],
)
def test_a_recording_holds_cuda_operators_at_the_cost_of_tritons(
    load: Any, program: str, kernels: dict[str, str | None]
) -> None:
    benchmark = load("kernels")
    costs: dict[str, dict[str, Any]] = {}
    for backend in ("triton", "cuda"):
        with use_backend(backend):
            run = benchmark.programs({**TINY, "device": str(DEVICE)}, 2)[program]()
            costs[backend] = {}
            for launch in benchmark.record(run):
                costs[backend].setdefault(launch.name, launch.cost)
    assert costs["cuda"].keys() >= kernels.keys()
    for ours, theirs in kernels.items():
        assert costs["cuda"][ours].bytes > 0
        if theirs is not None:
            assert costs["cuda"][ours] == costs["triton"][theirs]


def test_backends_measure_what_they_have_kernels_for(load: Any) -> None:
    kernels = load("kernels")
    rooms = {path.parent.name for path in (ROOT / "sparsecnx").rglob("cuda.py") if path.parent.name != "ops"}
    names = {"convnextv2_block": {"block"}, "packing": {"gather", "scatter"}}
    assert set(kernels.ON_CUDA) == {"layout"}.union(*(names.get(room, {room}) for room in rooms))
    assert set(load("gpu_parity").ON_CUDA) == set(kernels.ON_CUDA) - {"layout"}
    assert kernels.offered("conv", ["triton", "cuda"]) == ["triton"]
    assert kernels.offered("grn", ["triton", "cuda"]) == ["triton", "cuda"]
    assert kernels.offered("layout", ["cuda"]) == ["cuda"]
    assert kernels.offered(kernels.DENSE, ["cuda"]) == ["torch"]


def test_kernels_of_no_cost_stop_the_benchmark(load: Any) -> None:
    class Unknown:
        __name__ = "unknown_kernel"
        arg_names = ("x_ptr",)

    with pytest.raises(KeyError, match="unknown_kernel has no entry"):
        load("kernel_costs").cost(Unknown(), (torch.zeros(1),), {})


# Parity.


@needs_triton
def test_parity_sees_a_wrong_gradient(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = load("gpu_parity")
    stage = {"channels": 8, "tile": 1, "image": 64, "batch": 3, "dtype": "float32", "device": str(DEVICE)}
    stage["backend"] = "triton"
    every = parity.operators
    fast = ("layer_norm", "scatter")

    def some(channels: int, layout: Layout) -> dict[str, Any]:
        return {name: value for name, value in every(channels, layout).items() if name in fast}

    monkeypatch.setattr(parity, "operators", some)
    found = parity.check_stage(stage)
    assert set(found) == set(fast)
    assert all(result["agrees"] for result in found.values())
    assert set(found["layer_norm"]["errors"]) == {"output", "grad x", "grad weight_vector", "grad bias_vector"}

    right = parity.results

    def wrong(run: Any, inputs: Any, layout: Any, gradient: Any) -> Any:
        values, gradient = right(run, inputs, layout, gradient)
        if inputs["x"].dtype == torch.float32 and "grad weight_vector" in values:
            values["grad weight_vector"] = values["grad weight_vector"] * 1.0001
        return values, gradient

    monkeypatch.setattr(parity, "results", wrong)
    found = parity.check_stage(stage)
    assert not found["layer_norm"]["agrees"]
    assert found["scatter"]["agrees"]


@needs_cuda
def test_parity_of_cuda_operators(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = load("gpu_parity")
    stage = {"channels": 8, "tile": 2, "image": 64, "batch": 3, "dtype": "bfloat16", "device": str(DEVICE)}
    every = parity.operators

    def some(channels: int, layout: Layout) -> dict[str, Any]:
        return {name: value for name, value in every(channels, layout).items() if not name.startswith("block")}

    monkeypatch.setattr(parity, "operators", some)
    found = parity.check_stage({**stage, "backend": "cuda"})
    assert set(found) == {"geometry", "depthwise_conv", "grn, sample", "grn, batch", "gather", "scatter"}
    assert all(result["agrees"] for result in found.values()), found
    assert len(found["geometry"]["errors"]) == 3 * (3 + 3)


@needs_cuda
def test_parity_sees_a_wrong_neighbour(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = load("gpu_parity")
    right = parity.geometry

    def wrong(drawn: torch.Tensor, device: torch.device, radii: Any) -> dict[str, torch.Tensor]:
        found = right(drawn, device, radii)
        if selected() == "cuda":
            found["count, neighbours 2"][3, 7] += 1
        return found

    stage = {"image": 128, "batch": 4, "device": str(DEVICE), "backend": "cuda"}
    launched = count_launches(monkeypatch)
    assert parity.check_geometry(stage)["agrees"]
    assert launched == {"tile_index", "neighbour_table"}
    monkeypatch.setattr(parity, "geometry", wrong)
    found = parity.check_geometry(stage)
    assert not found["agrees"]
    assert [key for key, error in found["errors"].items() if error] == ["count, neighbours 2"]


def count_launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the CUDA operators that the geometry calls, as they are called."""
    called, operators = set(), torch.ops.sparsecnx_cuda
    for name in ("tile_index", "neighbour_table"):
        operator = getattr(operators, name)

        def call(*arguments: Any, operator: Any = operator, name: str = name) -> Any:
            called.add(name)
            return operator(*arguments)

        monkeypatch.setattr(operators, name, call)
    return called


@needs_cuda
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compute-sanitizer runs it on a GPU")
def test_what_the_sanitizer_looks_at_is_every_kernel(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All instances of the templates, as they are compiled."""
    sanitizer, emulator = load("sanitizer_run"), cuda_emulator.load()
    monkeypatch.setattr(sanitizer, "GRIDS", ((2, 2),))
    monkeypatch.setattr(sanitizer, "CHANNELS", (40, 7))
    emulator.forget_launches()
    assert sanitizer.main(["--device", "cpu"]) == 0
    missing = set(emulator.kernels()) - {launch.kernel for launch in emulator.launches()}
    assert missing == set()
    ran = set(re.findall(r"(\w+) \(\d+ results\)", capsys.readouterr().out))
    assert ran == load("kernel_costs").CUDA_COSTS.keys()


# Choices.


@needs_cuda
@needs_triton
@pytest.mark.parametrize("step", choices.STEPS)
def test_both_backends_compute_a_step_that_is_timed(load: Any, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    benchmark = load("choices")
    kernel = [5, 5] if step.startswith("depthwise") else []
    case = {"step": step, "dtype": "float32", "channels": 8, "tile": 2, "side": 2, "kernel": kernel, "image": 64}
    case |= {"ratio": 0.5, "device": str(DEVICE), "batch": 2}
    entry = benchmark.measure_step(case)
    assert entry["rows"] == 2 * 2 * 4
    assert min(entry["triton_ms"], entry["cuda_ms"]) > 0

    right = benchmark.step_calls

    def wrong(*arguments: Any) -> Any:
        triton, cuda = right(*arguments)
        return triton, lambda: [1.01 * out for out in benchmark.tensors(cuda())]

    monkeypatch.setattr(benchmark, "step_calls", wrong)
    with pytest.raises(ArithmeticError, match="CUDA and Triton differ by 1"):
        benchmark.measure_step(case)


def _run(date: str, *times: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "gpu": "NVIDIA H200",
        "capability": [9, 0],
        "date": date,
        "torch": "2.11",
        "triton": "3.6",
        "toolkit": "13",
    }
    return {**facts, "times": list(times)}


def test_choices_are_added_to_what_is_known(load: Any, tmp_path: Path) -> None:
    save, path = load("choices").save, tmp_path / "choices.json"
    entry = {"step": "grn", "dtype": "bfloat16", "channels": 384, "tile": None, "kernel": [], "rows": 100}
    entry |= {"triton_ms": 0.2, "cuda_ms": 0.1}
    save(path, _run("2026-01-01", entry))
    save(path, _run("2026-01-02", entry))
    save(path, _run("2026-01-02", entry, {**entry, "step": "grn_backward"}))
    known = choices.read(path)
    assert [(one.date, one.step) for one in known] == [
        ("2026-01-01", "grn"),
        ("2026-01-02", "grn"),
        ("2026-01-02", "grn_backward"),
    ]
    before = path.read_text()
    assert '{"step": "grn", "dtype": "bfloat16", "channels": 384' in before
    with pytest.raises(ValueError, match="cuda_ms"):
        save(path, _run("2026-01-03", {**entry, "cuda_ms": 0.0}))
    assert path.read_text() == before


def test_shapes_of_choices_cover_every_step_once(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("choices")
    options = benchmark.parse(["--size", "tiny", "base", "tiny", "--dtypes", "bfloat16", "--out", "x"])
    cases = [case for shape in benchmark.shapes(options) for case in shape]
    keys = [(case["step"], case["channels"], case["tile"], tuple(case["kernel"])) for case in cases]
    depthwise = [step for step in choices.STEPS if step.startswith("depthwise")]
    # Two models of four stages; images and the decoder; smaller kernels in the stages of the first; geometry once.
    assert len(keys) == len(set(keys)) == 2 * 4 * (len(choices.STEPS) - 1) + 2 * 2 + 2 * 4 * len(depthwise) + 1
    assert ("depthwise_conv", 96, 8, (7, 7)) in keys
    assert ("depthwise_conv_weight_grad", 768, 1, (3, 3)) in keys
    assert ("grn", 384, None, ()) in keys
    assert {("gather_tiles", 3, 32, ()), ("scatter_tiles", 512, 1, ())} <= set(keys)
    with pytest.raises(SystemExit):
        benchmark.parse(["--device", "cpu"])
    assert "gpu_choices.json holds measurements of GPUs" in capsys.readouterr().err


def test_parity_covers_every_operator_that_triton_runs(load: Any) -> None:
    layout = Layout.from_mask(torch.zeros(1, 1, 1, dtype=torch.bool), (1, 1))
    checked = {name.split(",")[0] for name in load("gpu_parity").operators(4, layout)}
    rooms = {path.parent.name for path in (ROOT / "sparsecnx").rglob("triton.py") if path.parent.name != "ops"}
    names = {"convnextv2_block": {"block"}, "packing": {"gather", "scatter"}}
    assert checked == set().union(*(names.get(room, {room}) for room in rooms))


@pytest.mark.parametrize(("wrong", "unfinished", "code"), [(0, 0, 0), (1, 1, 1), (0, 1, 3)])
def test_exit_code_of_parity(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: int, unfinished: int, code: int
) -> None:
    parity = load("gpu_parity")
    isolated = load("isolated")

    def outcomes(tasks: Any, jobs: int, deadline: float) -> Iterator[Any]:
        for index, task in enumerate(tasks):
            if index < unfinished:
                yield isolated.Outcome(task, "skipped", error="no time")
            else:
                yield isolated.Outcome(
                    task,
                    "done",
                    1.0,
                    {"grn": {"errors": {"output": 1.0}, "same_bits": True, "agrees": index > unfinished or not wrong}},
                )

    monkeypatch.setattr(parity.isolated, "outcomes", outcomes)
    out = tmp_path / "parity.json"
    assert parity.main([*SMALL, "--dtypes", "float32", "--out", str(out)]) == code
    content = json.loads(out.read_text())
    assert (content["wrong"], content["unfinished"]) == (wrong, unfinished)


# Steps.


@pytest.fixture
def step_case(load: Any) -> dict[str, Any]:
    steps = load("steps")
    options = steps.parsed(
        steps.arguments("", list(SIZES)), [*SMALL, "--dtype", "float32", "--compiler", "eager", "--out", "x"]
    )
    case: dict[str, Any] = steps.settings(options, "atto")
    return case


@pytest.fixture
def uncompiled(load: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a process of its own would leave behind."""
    masked_dense = load("sparsecnx.models.masked_dense")
    monkeypatch.setattr(masked_dense, "masked_block", masked_dense.masked_block)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["sparse", "dense", "dense_cast", "dense_whole"])
def test_encoder_variants_agree(load: Any, step_case: Any, uncompiled: None, tmp_path: Path, name: str) -> None:
    steps, encoder_step = load("steps"), load("encoder_step")
    variant = encoder_step.variants(step_case)[name]
    found = steps._measure(variant, 2, tmp_path / "e.json", "now", 0.01)
    assert found["agrees"], found
    assert found["errors"]["output"] < 1e-5
    assert found["ms"]["median"] > 0
    assert found["saved_bytes"] > 0
    (case,) = json.loads((tmp_path / "e.json").read_text())["cases"].values()
    assert case["variants"][name]["images_per_s"] == found["images_per_s"]
    assert (case["batch"], case["run"]) == (2, "now")


def test_blocks_are_compiled_once_a_stage(
    load: Any, step_case: Any, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "atto", Size((3, 3, 3, 3), (8, 16, 24, 32)))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    step = load("encoder_step").variants({**step_case, "compiler": backend})["dense"].build(2)
    with torch.no_grad():
        step.forward()
    assert len(graphs) == 4 + 4


def test_a_wrong_sparse_encoder_is_timed_and_said_to_be_wrong(
    load: Any, step_case: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps, encoder_step = load("steps"), load("encoder_step")
    right = encoder_step.Work.sparse

    def wrong(work: Any, images: Tensor, mask: Tensor) -> SparseTensor:
        out = right(work, images, mask)
        return out.with_features(1.001 * out.features)

    monkeypatch.setattr(encoder_step.Work, "sparse", wrong)
    found = steps._measure(encoder_step.variants(step_case)["sparse"], 2, tmp_path / "e.json", "now", 0.01)
    assert found["agrees"] is False
    assert found["errors"]["output"] == pytest.approx(1e-3, rel=0.01)
    assert found["ms"]["median"] > 0


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_pretraining_steps_agree(load: Any, step_case: Any, uncompiled: None, name: str) -> None:
    fcmae_step = load("fcmae_step")
    step = fcmae_step.variants(step_case)[name].build(2)
    before = [parameter.clone() for parameter in step.inputs[1:]]
    step.reset()
    step.run()
    assert step.check()["agrees"], step.check()
    assert step.check()["errors"]["loss"] < 1e-5
    changed = [not torch.equal(a, b) for a, b in zip(before, step.inputs[1:], strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_mae_of_torch_modules(load: Any) -> None:
    fcmae_step = load("fcmae_step")
    model = fcmae_step.TorchMAE(64, dim=32, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    loss = model(torch.randn(2, 3, 64, 64))
    loss.backward()
    assert 0.5 < float(loss.detach()) < 5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_mae_of_torch_modules_is_as_large_as_a_vit_b(load: Any) -> None:
    with torch.device("meta"):
        model = load("fcmae_step").TorchMAE(224)
    millions = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    assert millions == pytest.approx(111.7, rel=0.005)  # ViT-B/16 and the paper's decoder


def _out_of_memory(least: int, batch: int) -> Any:
    if batch > least:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    raise ZeroDivisionError("wrong")


def _fits(steps: ModuleType, batch: int) -> Any:
    if batch > 2:
        raise RuntimeError("backend failed: CUDA out of memory")
    return steps.Step(lambda: None, lambda: None, [], dict)


def test_the_largest_batch_that_fits_is_used(
    load: Any, step_case: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = load("steps")
    monkeypatch.setattr(load("record"), "machine", dict)  # a GPU that this process uses is none of its forks'
    out = tmp_path / "steps.json"
    runner = steps.Runner(out, float("inf"), 0.01, 30)
    assert runner.measure(steps.Variant("a", step_case, functools.partial(_fits, steps)), [8, 4, 2, 1]) == 2
    assert not runner.failed
    assert runner.measure(steps.Variant("b", step_case, functools.partial(_out_of_memory, 4)), [8, 4]) is None
    assert runner.failed
    cases = json.loads(out.read_text())["cases"]
    assert set(cases) == {"atto-mask0.5-batch2-64px-float32-cpu", "atto-mask0.5-batch4-64px-float32-cpu"}
    failure = cases["atto-mask0.5-batch4-64px-float32-cpu"]["variants"]["b"]
    assert (failure["status"], failure["error"]) == ("failed", "ZeroDivisionError: wrong")


def test_batches_far_too_large_are_not_tried(load: Any) -> None:
    tried = load("steps").batches_to_try
    assert tried([32, 256, 128], 2.0, 400) == [128, 32]
    assert tried([32, 256, 128], 2.0, 0) == [256, 128, 32]
    assert tried([32, 256, 128], 2.0, 10) == [32]


def test_steps_queue_up_on_a_gpu(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between events; the device is waited for before the first and after the last alone."""
    steps, order = load("steps"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(order)
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    times = steps.timed(lambda: order.append("run"), lambda: order.append("reset"), torch.device("cuda"), 2)
    assert order == ["wait", "event", "reset", "run", "event", "reset", "run", "event", "wait"]
    assert times == [3.0, 3.0]


def test_kernels_are_timed_behind_a_flush_with_the_device_waiting(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, order = load("kernels"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    call, flush = (lambda: order.append("call")), (lambda: order.append("flush"))
    times = kernels.queued(call, torch.device("cuda"), 2, flush)
    once = ["flush", "event", "call", "event"]
    assert order == ["wait", "sleep", *once, *once, "wait"]
    assert times == [0.5, 0.5]


def test_the_process_that_forks_never_touches_the_gpu(tmp_path: Path) -> None:
    """What it forks could not use the GPU any more."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(BENCHMARKS)!r})
def touched(*_):
    raise SystemExit("touched the GPU")
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = torch.cuda.is_available = touched
import choices, encoder_step, fcmae_step, gpu_parity, isolated, kernels
facts = {{"name": "a GPU", "memory_bytes": 2**36}}
def outcomes(tasks, jobs=1, deadline=0.0):
    for task in tasks:
        known = {{"device": facts, "rates": {{"copy_bytes_per_s": 1.0}}}}
        if task.name in known:
            yield isolated.Outcome(task, "done", 1.0, known[task.name])
        else:
            seen.append(task.name)
            yield isolated.Outcome(task, "failed", 1.0, error="not here")
isolated.outcomes = outcomes
for module in (choices, encoder_step, fcmae_step, gpu_parity, kernels):
    seen = []
    assert module.main(["--out", {str(tmp_path / "out.json")!r}]) == 1
    print(module.__name__, len(seen))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert int(counts["encoder_step"]) == 2 * 3 * 5  # each variant of each size fails, and that is noted
    assert int(counts["kernels"]) == 3 * 4 + 4
    assert int(counts["choices"]) > 30


# Launch overhead.


def test_time_covered_by_kernels_counts_once(load: Any) -> None:
    covered = load("launch_overhead").covered
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75), (3.0, 4.0)]) == 5.0
    assert covered([]) == 0.0


def test_busy_is_what_the_profiler_says_or_else_the_queued_step(load: Any) -> None:
    busy = load("launch_overhead").busy
    step = {"ms": {"median": 10.0}}
    assert busy({**step, "kernel_ms": 9.5, "queued_ms": 9.9}) == {
        "busy": 0.95,
        "busy_by": "kernel_ms",
        "meets_goal": True,
    }
    assert busy({**step, "queued_ms": 5.0}) == {"busy": 0.5, "busy_by": "queued_ms", "meets_goal": False}
    assert busy(step) == {}


def test_every_step_of_the_overhead_has_another_mask(load: Any, step_case: Any) -> None:
    overhead = load("launch_overhead")
    masks: list[Tensor] = []
    step = load("encoder_step").sparse(step_case, True, 8)
    mask = step.inputs[1]
    renew = overhead.renewal(mask, step_case["ratio"])

    def run() -> None:
        masks.append(mask.clone())
        step.run()

    def reset() -> None:
        step.reset()
        renew()

    found = overhead.mode(run, reset, torch.device("cpu"), 0.01)
    assert found["ms"]["median"] > 0
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
    assert {int((~one).sum()) for one in masks} == {8 * 2}

    def replay() -> None:
        step.reset()  # a graph writes gradients and adds to none
        step.run()

    assert overhead.check(step, replay, renew)["agrees"]
    assert not overhead.check(step, lambda: None, renew)["agrees"]  # still of the mask before


# The summary.


def test_summary_of_what_is_there(load: Any, tmp_path: Path) -> None:
    summary = load("gpu_summary")
    (tmp_path / "parts.tsv").write_text("machine\tok\t4\tH100\nparity\tfailed\t9\texit code 1\n")
    (tmp_path / "log.txt").write_text("".join(f"line {index}\n" for index in range(99)))
    wrong = {"errors": {"output": 0.5}, "same_bits": True, "agrees": False}
    stages = {
        "tiny stage 1 float32": {"operators": {"grn": {"errors": {"output": 2e-7}, "same_bits": True, "agrees": True}}},
        "tiny stage 2 float32": {"operators": {"grn": wrong, "block": {"error": "RuntimeError: no", "agrees": False}}},
        "tiny stage 3 float32": {"status": "timeout", "error": "ended after 9 s"},
    }
    (tmp_path / "parity.json").write_text(json.dumps({"bounds": {"float32": 1e-5}, "stages": stages}))

    def variant(ms: float, peak: int, **more: Any) -> dict[str, Any]:
        return {
            "ms": {"median": ms},
            "images_per_s": 1e3 / ms,
            "peak_bytes": peak,
            "total_bytes": peak,
            "first_s": 1,
            **more,
        }

    variants = {
        "dense": variant(100.0, 2**31),
        "dense_whole": variant(80.0, 2**30),
        "sparse": variant(20.0, 2**28, agrees=False, errors={"output": 9.0}),
        "sparse_graph": {"status": "failed", "error": "RuntimeError: not while capturing"},
    }
    (tmp_path / "encoder.json").write_text(json.dumps({"cases": {"base": {"variants": variants}}}))
    cases = {"vit": {"variants": {"vit": variant(40.0, 1)}}, "base": {"variants": {"sparse": variant(20.0, 1)}}}
    (tmp_path / "fcmae.json").write_text(json.dumps({"cases": cases}))
    kernel = {"launches": 1, "floor_ms": 0.01, "bytes": 1, "matrix_flops": 0, "vector_flops": 1, "bound": "bytes"}
    kernel |= {"fraction": 0.5, "share": 1.0}

    def measured(program: str, backend: str, *kernels: tuple[str, str, float], **more: str) -> dict[str, Any]:
        timed = [{**kernel, "name": name, "phase": phase, "ms": ms} for name, phase, ms in kernels]
        case = {"size": "tiny", "stage": 1, "channels": 96, "batch": 256, "dtype": "bfloat16", "rates": rates}
        total = sum(ms for *_, ms in kernels)
        case |= {"ms": 1.0, "queued_ms": total, "gap_ms": 0.0, "sum_ms": total, "kernels": timed, **more}
        return {**case, "program": program, "backend": backend}

    rates = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14, "vector_flops_per_s": 6e13, "empty_ms": 0.002}
    conv, grad = ("depthwise_conv_kernel", "forward", 0.04), ("depthwise_conv_kernel", "backward", 0.05)
    weight_grad = [("depthwise_conv_weight_grad_kernel", "backward", 0.06), ("torch.sum", "backward", 0.02)]
    flip = ("torch.flip", "backward", 0.01)
    dense = [("torch.depthwise_conv", "forward", 0.5), ("torch.depthwise_conv_weight_grad", "backward", 0.8)]
    cases = {
        "t": measured("depthwise_conv", "triton", conv, grad, *weight_grad, flip),
        "c": measured("depthwise_conv", "cuda", ("cuda.depthwise_conv", "forward", 0.02)),
        "d": measured("dense_depthwise_conv", "torch", *dense, images="equal sites"),
    }
    (tmp_path / "kernels.json").write_text(json.dumps({"cases": cases}))
    step = {"dtype": "bfloat16", "channels": 96, "tile": 8, "triton_ms": 0.2, "cuda_ms": 0.1}
    times = [{**step, "step": "depthwise_conv"}, {**step, "step": "grn", "channels": 384, "tile": None}]
    (tmp_path / "gpu_choices.json").write_text(json.dumps({"runs": [_run("2026-01-01", *times)]}))
    modes = {
        "eager": {"ms": {"median": 10.0}, "kernel_ms": 4.0, "busy": 0.4, "busy_by": "kernel_ms", "launches": 500.2},
        "graph": {"ms": {"median": 4.5}, "agrees": False},
    }
    (tmp_path / "overhead.json").write_text(json.dumps({"cases": {"atto": {"modes": modes}}}))
    times = {"encoder": {"minkowski": {"median": 90.0}, "api": {"median": 6.0}, "fused": {"median": 5.0}}}
    (tmp_path / "minkowski.json").write_text(json.dumps({"cases": {"tiny": {"ms": times}}}))
    text = summary.summary(tmp_path)
    assert "| tiny | encoder | api | 6.00 | 1.200 | 0.067 |" in text
    assert "| tiny stage 1 | forward | 96 | 40.0 (0.25) | 20.0 (0.50) | 500.0 (0.02) | - | 0.500 | 0.040 |" in text
    assert "| tiny stage 1 | input gradient | 96 | 50.0 (0.20) | - | - | - | - | - |" in text
    assert "| tiny stage 1 | weight gradient | 96 | 80.0 (0.25) | - | 800.0 (0.01) | - | - | - |" in text
    assert "| tiny stage 1, depthwise_conv | 96 | 256 | 0.180 (triton) | 0.020 | 0.111 | 0.111 |" in text
    assert "| bfloat16 | 96 | 8 | 0.50 | - |" in text
    assert "| bfloat16 | 384 | - | - | 0.50 |" in text
    assert "| atto | eager | 10.000 | 4.000 | - | 500 | 40.0% (kernel_ms) |" in text
    assert "| atto | graph **wrong** | 4.500 | - | - | - | - |" in text
    assert "| parity | failed | 9 | exit code 1 |" in text
    assert "| grn | 2.0e-07 |" in text
    assert "**3 do not agree or did not run:**" in text
    assert "| tiny stage 2 float32 | block | RuntimeError: no |" in text
    assert "| base | sparse **wrong** | 20.00 | 50 | 0.250 | 0.25 | 0.250 |" in text
    assert "| base | sparse_graph | failed: RuntimeError: not while capturing |" in text
    assert "| base | sparse | 20.00 | 50 | - | 0.00 | - | - | - | 0.00 | 1.0 | 0.500 |" in text
    assert "line 98" in text
    assert "line 50\n" not in text
    widths = [
        [line.count("|") for line in block.splitlines()] for block in text.split("\n\n") if block.startswith("| ")
    ]
    assert all(len(set(block)) == 1 for block in widths)


@needs_triton
@pytest.mark.parametrize(("limit", "kept"), [(0, 6), (10_000, 2)])
def test_counts_of_a_block(load: Any, monkeypatch: pytest.MonkeyPatch, limit: int, kept: int) -> None:
    """What docs/kernels.md says a row moves and keeps; sums over images are what is beyond the whole numbers."""
    counts = load("counts")
    monkeypatch.setattr(counts.block_room, "RECOMPUTE_CHANNELS", limit)
    costs, kept_bytes = counts.sparse_per_row("tiny", 1, 0.6, 224)
    width = 2 * 96
    assert kept <= kept_bytes / width < kept + 0.5
    assert 2 <= costs["depthwise_conv_kernel, forward"]["bytes"] / width < 2.5
    assert sum(cost["matrix"] for cost in costs.values()) == (9 if limit else 6) * 8 * 96**2
