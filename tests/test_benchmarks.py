"""Run the commands of benchmarks/ at tiny sizes, and check that what they measure is what they say."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sparsecnx.backends import triton_launch
from sparsecnx.models import SIZES, create_fcmae
from sparsecnx.models.convnextv2 import Size

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ["--size", "atto", "--image", "64", "--batch", "2", "--ratio", "0.5", "--threads", "1", "--repeats", "2"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import benchmarks by name, with the fewest channels in a model; restore the threads that they set."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(SIZES, "atto", Size((1, 1, 1, 1), (8, 8, 16, 16)))

    def load_benchmark(name: str) -> Any:
        loaded = sys.modules.get(name)
        if loaded is not None and Path(str(loaded.__file__)).parent != BENCHMARKS:  # tests/operators.py
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(name)

    yield load_benchmark
    torch.set_num_threads(threads)


@pytest.fixture
def encoder(load: Callable[[str], Any]) -> ModuleType:
    return load("encoder")


@pytest.fixture
def small(encoder: ModuleType) -> Any:
    """Return a case at the smallest setting."""
    return encoder.selected_cases(encoder.parse(SMALL))[0]


def test_encoder_writes_what_it_measured(
    encoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "results" / "encoder.json"
    arguments = [*SMALL, "--ratio", "0", "0.5", "--variants", "sparse", "dense", "--anatomy"]
    arguments += ["--out", str(out), "--plot", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "encoder.py"), *arguments])
    assert encoder.main() == 0
    printed = capsys.readouterr().out

    content = json.loads(out.read_text())
    case = content["cases"]["atto-mask0.5-batch2-64px-float32-cpu-1threads"]
    facts = content["runs"][case["run"]]
    assert (case["visible"], case["patches"]) == (2, 4)
    assert facts["command"].startswith("python benchmarks/encoder.py --size atto")
    assert facts["versions"]["torch"] == torch.__version__
    assert 0 < case["errors"]["sparse"]["gradient"] < 1e-4
    for mode in ("forward", "forward_backward"):
        assert set(case["ms"][mode]) == {"sparse", "dense", "floor"}
        for times in case["ms"][mode].values():
            assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= max(times["repeats"])
    for memory in (case["saved_bytes"], case["peak_bytes"]):
        assert 0 < memory["sparse"] < memory["dense"]
    assert case["saved_bytes"]["dense"] < case["peak_bytes"]["dense"]
    anatomy = case["anatomy"]
    check_parts(anatomy)
    assert anatomy["parts"]["fused block"] > 0 and anatomy["parts"]["products"] > 0
    stages = [(stage["channels"], stage["tile"], stage["rows"], stage["blocks"]) for stage in anatomy["stages"]]
    assert stages == [(8, 8, 256, 1), (8, 4, 64, 1), (16, 2, 16, 1), (16, 1, 4, 1)]
    for stage in anatomy["stages"]:
        assert min(stage["ms"], stage["products"], stage["depthwise"]) > 0 and stage["rest"] >= 0
    assert anatomy["downsampling"] > 0 and anatomy["outside"] >= 0
    assert "atto, mask 0.5, batch 2, 64 px" in printed and "all blocks" in printed
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"encoder-ratio.png", "encoder-size.png", "encoder-memory.png"}


def check_parts(anatomy: dict[str, Any]) -> None:
    """Check that parts are times, and that they leave out nothing of the whole."""
    parts = anatomy["parts"].values()
    assert min(parts) >= 0 and sum(parts) > anatomy["ms"] - 0.01 > 0
    assert all(ms > 0 for ms in anatomy["operators"].values())


def test_an_operator_belongs_to_one_part(load: Callable[[str], Any]) -> None:
    parts = {
        "fused block": "sparsecnx::convnextv2_block_backward",
        "products": "sparsecnx::linear sparsecnx::linear_weight_grad aten::mm aten::addmm",
        "depthwise": "sparsecnx::depthwise_conv sparsecnx::mapped_depthwise_conv_weight_grad",
        "convolution": "sparsecnx::conv aten::convolution_backward aten::_slow_conv2d_forward",
        "pooling": "sparsecnx::max_pool_backward aten::avg_pool2d",
        "elementwise": "aten::native_batch_norm sparsecnx::site_norm sparsecnx::grn aten::gelu_backward aten::add_",
        "rest": "aten::copy_ aten::empty sparsecnx::gather_tiles aten::floor_divide",
    }
    for part, names in parts.items():
        assert {load("measure").part_of(name) for name in names.split()} == {part}


@pytest.mark.parametrize(
    "command",
    [
        "overhead --repeats 2",
        "operators --batch 1 --repeats 2 --operators max_pool3/2 conv2x2/2-transposed kernel_map",
        f"training_step {' '.join(SMALL)} --variants sparse",
        f"minkowski_encoder {' '.join(SMALL)}",
        "networks --models convnext_atto --image 64 --ratio 0.5 --batch 2 --threads 1 --repeats 2 "
        "--variants sparse dense --anatomy",
        "volumes --cases depthwise_3 fcmae_16 --side 32 --threads 1 --repeats 2 --variants sparse dense",
        pytest.param(
            f"kernels {' '.join(SMALL)} --device cpu --dtype float32 --stage 4 --backend triton "
            "--programs dense_depthwise_conv depthwise_conv block gather",
            marks=pytest.mark.skipif(not triton_launch.interpreting, reason="needs Triton's interpreter"),
        ),
    ],
    ids=lambda command: command.split()[0],
)
def test_others_run(command: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    name, *options = command.split()
    if name == "networks":
        pytest.importorskip("timm")
    code = load(name).main([*options, "--out", str(tmp_path / "out.json")])
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases
    for case in cases.values():
        if name == "networks":
            check_parts(case["anatomy"])
    assert code == 0 or name == "overhead"  # which misses its goal on a busy machine


def test_the_check_of_networks_writes_what_it_found(load: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    check = load("check_networks")

    class Wrong(torch.nn.Conv2d):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * (1.0 if isinstance(x, torch.Tensor) else 1.0 + 1e-9)

    networks = {
        "right": lambda: torch.nn.Conv2d(3, 4, 3, padding=1),
        "wrong": lambda: Wrong(3, 4, 3, padding=1),
        "flat": torch.nn.Flatten,
    }
    settings = {}
    found = check.run_all(((name, build, check.PLANE) for name, build in networks.items()), settings)
    assert [status for status, _ in found.values()] == ["equal", "differs", "raises"]
    check.write_page(tmp_path / "page.md", found, settings)
    page = (tmp_path / "page.md").read_text()
    assert "## 1 are equal\n\n`right`." in page and "| `flat` | flatten on a SparseTensor: " in page


def test_gpu_suite_sums_up_its_parts(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load("gpu_suite")
    _, command = suite.PARTS["training_step"]
    command = command.replace(suite.GPU, f"{' '.join(SMALL)} --by-block").replace("tiny base", "atto")
    parts = {"training_step": (300, f"{command} --variants sparse"), "broken": (60, "-c 'exit(3)'")}
    monkeypatch.setattr(suite, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path)])
    assert suite.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["training_step"]["status"] == "ok", summary["training_step"]["log"]
    assert summary["training_step"]["results"]["cases"]
    assert summary["broken"]["status"] == "exit code 3"


def test_a_wrong_model_is_refused(
    encoder: ModuleType, small: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = encoder.Workload(small)
    workload.check()
    model = workload.models["sparse"]
    gamma, bias = model.stages[2][0].grn.gamma, model.stages[0][0].dwconv.bias
    with torch.no_grad():
        gamma.mul_(1.01)
    with pytest.raises(encoder.measure.Mismatch, match=r"sparse in atto-mask0\.5-.* differs from the expected result"):
        workload.check()
    with torch.no_grad():
        gamma.div_(1.01)
    for hook, message in (
        (lambda grad: 1.001 * grad, r"dwconv\.bias by 1\.0e-03"),
        (lambda grad: grad * torch.nan, "nan"),
    ):
        handle = bias.register_hook(hook)
        with pytest.raises(encoder.measure.Mismatch, match=message):
            workload.check()
        handle.remove()
    monkeypatch.setitem(encoder.measure.TOLERANCE, "float32", 1e-12)
    assert encoder.main([*SMALL, "--variants", "sparse"]) == 1
    assert "not timed: sparse in atto" in capsys.readouterr().err


def test_in_bfloat16_sparse_may_be_as_far_off_as_eager_dense(
    encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = encoder.measure.TOLERANCE
    workload = encoder.Workload(encoder.replace(small, dtype="bfloat16"))
    expected = workload.eager_dense(workload.reference, workload.images, "float32")
    monkeypatch.setitem(tolerance, "bfloat16", 1.0)
    dense = workload.check()["dense"]
    assert workload.limit(expected) == (1.0, 1.0)
    monkeypatch.setitem(tolerance, "bfloat16", 1e-9)
    limits = workload.limit(expected)
    assert limits == (dense["output"], dense["gradient"]) and min(limits) > 1e-3
    workload.models["sparse"].stages[0][0].dwconv.bias.register_hook(lambda grad: (1 + 2 * limits[1]) * grad)
    with pytest.raises(encoder.measure.Mismatch, match=r"sparse in .* differs"):
        workload.check()
    assert encoder.Workload(small).limit(expected) == (tolerance["float32"],) * 2


def test_saved_bytes_are_what_forward_allocates_and_does_not_free(
    encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    workload = encoder.Workload(small, ("sparse", "dense", "compiled"))
    workload.check()
    saved = workload.saved_bytes()
    for name in workload.models:
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


def test_dense_encoders_compile_whole_or_by_block(
    encoder: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    workload = encoder.Workload(small, ["compiled"])
    for ratio in (0.0, 0.5):
        workload.set_ratio(encoder.replace(small, ratio=ratio))
        workload.check()
    assert len(graphs) == 1, "compiled once for all ratios"
    compile_module = functools.partial(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile_module(module, **options))
    encoder.Workload(small, ["compiled"], by_block=True).check()
    assert len(graphs) > 8, "a graph for each block and each downsampling layer"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--image", "100"], "--image is 100: expected a multiple of 32"),
        (["--ratio", "1.0"], "ratio is 1.0: expected 0 <= ratio < 1"),
        (["--batch", "0"], "--batch is [0]: expected 1 or more"),
        (["--size", "small"], "invalid choice: 'small'"),
        (["--plot", "plots"], "--plot draws what --out holds: give both"),
        (["--anatomy", "--variants", "dense"], "--variants has dense, on cpu: --anatomy needs sparse, on a CPU"),
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
    for run, cases in (("first", "ab"), ("second", "a")):
        results = encoder.Results(path)
        results.run = run
        for key in cases:
            results.add(key, {"value": run})
    content = json.loads(path.read_text())
    assert content["cases"] == {"a": {"run": "second", "value": "second"}, "b": {"run": "first", "value": "first"}}
    assert set(content["runs"]) == {"first", "second"}
    results.add("b", {"value": 2})
    assert set(json.loads(path.read_text())["runs"]) == {"second"}


def test_scaling_counts_what_torch_counts_and_marks_it_as_predicted(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling, out = load("scaling"), tmp_path / "scaling.json"
    options = ["--size", "atto", "--image", "64", "--batch", "128", "--ratio", "0.5", "--out", str(out)]
    assert scaling.main(options) == 0
    assert "PREDICTED" in capsys.readouterr().out
    cases = json.loads(out.read_text())["cases"]
    assert [case["gpus"] for case in cases.values()] == [1, 64, 8] and all(case["predicted"] for case in cases.values())
    alone, many = cases["atto-1gpus"], cases["atto-64gpus"]
    model = create_fcmae("atto")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 3, 64, 64), mask_ratio=0.5)[0].backward()
    assert alone["flops"] == 64 * many["flops"] == 128 / 3 * counter.get_total_flops()
    assert alone["parameters"] == sum(p.numel() for p in model.parameters())
    for case in cases.values():
        for name in ("ddp", "fsdp2"):
            slow, fast = case[name]["images_per_s"]
            assert 0 < slow <= fast <= 1.001 * case["gpus"] * alone[name]["images_per_s"][0]
    # DDP gathers and reduces 4 bytes of a parameter, FSDP2 gathers them twice and reduces them.
    for case in (many, cases["atto-8gpus"]):
        assert case["fsdp2"]["network_seconds"] == pytest.approx(1.5 * case["ddp"]["network_seconds"])
    assert alone["ddp"]["network_seconds"] == 0 and many["ddp"]["of_linear"][0] < 1
    assert alone["ddp"]["state_bytes"] == 64 * many["fsdp2"]["state_bytes"] == 16 * alone["parameters"]


def test_scaling_sums_the_network_and_the_work_as_its_page_says(load: Callable[[str], Any]) -> None:
    scaling = load("scaling")
    # In a ring of 8 each sends 7/8 of the bytes; of 8 nodes each port sends 7/8 of an eighth.
    nvlink, network = 0.8 * 450e9, 0.8 * 50e9
    assert scaling.collecting(8e9, 1) == 0
    assert scaling.collecting(8e9, 8) == pytest.approx(7e9 / nvlink)
    assert scaling.collecting(8e9, 64) == pytest.approx(7e9 / nvlink + 7 / 8 * 1e9 / network)
    work = scaling.Work
    heavy, large, small = work(1e12, 1.0), work(0.0, 1e9), work(0.0, 1.0)
    works = [heavy, large, small], [work(2e12, 1.0), work(0.0, 1.5e9), small]
    found = scaling.computing(works, 3)
    assert (found["flops"], found["bytes"]) == (3e12, 2 * (2e9 + 2))
    assert found["seconds"] == pytest.approx(3e12 / (0.4 * 989e12) + 4e9 / (0.7 * 3.35e12) + 5e-6)
    with pytest.raises(SystemExit):
        scaling.main(["--gpus", "12"])
