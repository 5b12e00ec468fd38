"""`sparsecnx doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

import pytest
import torch

import sparsecnx
from sparsecnx import _extension, doctor


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
