"""`sparsecnx doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from itertools import product
from types import ModuleType

import pytest
import torch
from cases import needs_triton

import sparsecnx
from sparsecnx import _extension, _triton, doctor, explain, ops


def check(name: str) -> doctor.Check:
    return next(check for check in doctor.checks() if check.name == name)


def break_import(monkeypatch: pytest.MonkeyPatch, module: str, error: Exception) -> None:
    """Let `importlib.import_module(module)` raise `error`."""
    original = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == module:
            raise error
        return original(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_report_covers_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    report = capsys.readouterr().out
    assert report.startswith(f"sparsecnx {sparsecnx.__version__}\n")
    for name in ("Python", "torch", "GPU", "Triton", "CPU operators", "CUDA operators", "MinkowskiEngine"):
        assert len(re.findall(rf"^(?:ok|--)  {name} ", report, re.MULTILINE)) == 1
    assert torch.__version__ in report


def test_everything_missing_comes_with_a_reason_and_a_remedy() -> None:
    for found in doctor.checks():
        assert found.detail
        assert found.ok or found.remedy or "not part of this version" in found.detail, found


def test_lines_are_aligned() -> None:
    columns = set()
    for line in doctor.report().splitlines()[2:]:
        entry = re.match(r"(?:ok|--)  \S+(?: \S+)* {2,}|  +-> ", line)
        assert entry, line
        columns.add(entry.end() - (3 if entry[0].endswith("-> ") else 0))
    assert len(columns) == 1


def test_compiled_operators() -> None:
    found = check("CPU operators")
    assert found.ok == _extension.loaded
    facts = _extension.build_info()
    if facts is None:
        assert found.detail == _extension.why_not
    else:
        assert f"{facts['compiler']}" in found.detail and f"{facts['torch']}" in found.detail


def test_operators_of_another_version_are_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _extension.loaded:
        pytest.skip(f"{_extension.why_not}")
    monkeypatch.setattr(sparsecnx, "__version__", "9.9.9")
    found = check("CPU operators")
    assert not found.ok
    assert found.remedy is not None and found.remedy.startswith("pip install")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "skimage", ModuleNotFoundError("No module named 'skimage'", name="skimage"))
    assert check("scikit-image") == doctor.Check(
        "scikit-image", False, "not installed", "pip install 'sparsecnx[train]'"
    )


def test_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    found = check("torchvision")
    assert found.detail == "installed, but does not import: operator torchvision::nms does not exist"
    assert found.remedy is not None and torch.__version__ in found.remedy


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "triton", ModuleNotFoundError("No module named 'triton'", name="triton"))
    found = check("Triton")
    assert not found.ok
    assert found.detail == "not installed"
    assert found.remedy is not None and "CUDA build of torch" in found.remedy


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """As on a machine with GPUs of these compute capabilities and without Triton's interpreter."""
    monkeypatch.setattr(_triton, "interpreting", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])


@needs_triton
@pytest.mark.parametrize(
    ("capabilities", "ok", "detail"),
    [
        ((), False, ", but there is no GPU to run its kernels on"),
        (((9, 0),), True, ", kernels run on the GPU, compiled on first use"),
        (((7, 5),), False, ", but Triton kernels need compute capability 8.0, cuda:0 has 7.5"),
        (
            ((8, 0), (7, 5)),
            True,
            ", kernels run on the GPU, compiled on first use; Triton kernels need compute capability 8.0, "
            "cuda:1 has 7.5",
        ),
    ],
    ids=["no GPU", "new", "old", "both"],
)
def test_triton_kernels_need_a_new_enough_gpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[tuple[int, int], ...], ok: bool, detail: str
) -> None:
    gpus(monkeypatch, *capabilities)
    found = doctor._triton_kernels()
    assert found.ok == ok and (found.remedy is None) == ok
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*" + re.escape(detail), found.detail)


@needs_triton
def test_triton_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "interpreting", True)
    found = doctor._triton_kernels()
    assert found.ok and "interpreter" in found.detail
    assert found.remedy is not None and "TRITON_INTERPRET" in found.remedy


def test_what_runs_without_cuda_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "build_info", lambda: None)
    detail = check("CUDA operators").detail
    assert detail == "not part of this version: tensors on a GPU go through the Triton kernels"


def test_explanation_covers_every_operator_at_every_stage() -> None:
    public = set(ops.__all__) - {"BlockParameters", "draw_survival"}
    assert {operator.name for operator in explain.OPERATORS} == public
    cpu = torch.device("cpu")
    lines = explain.report(cpu, torch.float32, "tiny").splitlines()
    table = lines[3 : lines.index("", 2)]
    fast = "native" if _extension.loaded else "reference"
    found = [tuple(line.split()[:4]) for line in table]
    stages = zip(("96", "192", "384", "768"), ("8", "4", "2", "1"), strict=True)
    assert found == [(operator.name, *stage, fast) for operator, stage in product(explain.OPERATORS, stages)]
    assert all("the fastest that can run" in line for line in table)


@pytest.mark.skipif(not _extension.loaded, reason=f"{_extension.why_not}")
def test_explanation_of_the_hidden_layer() -> None:
    pico, tiny = (explain.report(torch.device("cpu"), torch.float32, size) for size in ("pico", "tiny"))
    blocks = [line for line in pico.splitlines() if line.startswith("convnextv2_block ")]
    assert ["recomputed in backward" in line for line in blocks] == [True, False, False, False]
    assert "recomputed in backward" not in tiny


def test_explanation_says_why_the_others_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "loaded", False)
    monkeypatch.setattr(_extension, "why_not", "no C++ compiler")
    report = explain.report(torch.device("cpu"), torch.bfloat16, "atto")
    everything = ", ".join(operator.name for operator in explain.OPERATORS)
    assert f"native: no C++ compiler\n    {everything}" in report
    assert "triton: Triton kernels run on the CPU only when asked for by name" in report
    assert "What runs on cpu in bfloat16, in the four stages of ConvNeXt V2 Atto" in report


def test_version_of_a_module_that_another_distribution_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    modules = {"triton": ModuleType("triton"), "MinkowskiEngine": ModuleType("MinkowskiEngine")}
    modules["MinkowskiEngine"].__version__ = "0.5.4"  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", version)
    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or original(name))
    assert check("Triton").detail.startswith("version unknown")
    assert check("MinkowskiEngine").detail == "0.5.4"
