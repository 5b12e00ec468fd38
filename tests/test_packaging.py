"""What `pip install` leaves behind, with a compiler and without."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import sparsecnx
from sparsecnx import _extension, doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fresh source folder, with operators that compile in a second."""
    folder = tmp_path / "source"
    binaries = shutil.ignore_patterns("_C.*so", "_build_info.*so", "_build_failure.txt", "__pycache__")
    shutil.copytree(ROOT / "sparsecnx", folder / "sparsecnx", ignore=binaries)
    (folder / "csrc").mkdir()
    (folder / "csrc/library.cpp").write_text("int nothing;\n")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "csrc/build_info.cpp"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def pip(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pip` without build isolation: the environment that runs the tests has all that a build needs."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-build-isolation", "--no-deps"],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )


def compiled(package: Path) -> list[str]:
    return sorted(path.name for path in package.iterdir() if path.suffix == ".so")


def failing_compiler(folder: Path, *, on: str) -> str:
    """A C++ compiler that fails on source files whose name contains `on`."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{on}*) echo "error: no"; exit 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_pure_python_on_request(source: Path, tmp_path: Path) -> None:
    result = pip("wheel", source, "--wheel-dir", tmp_path, SPARSECNX_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sparsecnx-{sparsecnx.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsecnx/doctor.py" in names and "sparsecnx/py.typed" in names
    assert not [name for name in names if name.endswith((".so", "_build_failure.txt"))]


def test_core_depends_on_torch_alone_and_doctor_knows_the_train_extra(source: Path, tmp_path: Path) -> None:
    result = pip("wheel", source, "--wheel-dir", tmp_path, SPARSECNX_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    metadata = zipfile.Path(wheel, f"sparsecnx-{sparsecnx.__version__}.dist-info/")
    requires = importlib.metadata.PathDistribution(metadata).requires or []
    assert [item for item in requires if "extra ==" not in item] == ["torch>=2.11"]
    train = [item.split(";")[0].strip() for item in requires if re.search("extra == .train.", item)]
    assert sorted(train) == sorted(doctor.TRAIN)


def test_compiled_wheel_has_both_modules(source: Path, tmp_path: Path) -> None:
    result = pip("install", source, "--target", tmp_path / "installed", SPARSECNX_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    library, info = compiled(tmp_path / "installed/sparsecnx")
    assert library == "_C.abi3.so"
    assert info.startswith("_build_info.")


def test_without_compiler_the_install_succeeds_and_doctor_says_why(source: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    result = pip("install", source, "--target", installed, CXX="/nowhere/c++", SPARSECNX_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert compiled(installed / "sparsecnx") == []

    program = "import sparsecnx.doctor; print(sparsecnx.doctor.__file__); sparsecnx.doctor.run()"
    report = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert str(installed) in report
    assert "built as pure Python because: no C++ compiler: found none of /nowhere/c++" in report
    assert "-> Install g++" in report


def test_without_compiler_cpu_is_an_error(source: Path, tmp_path: Path) -> None:
    result = pip("install", source, "--target", tmp_path / "t", CXX="/nowhere/c++", SPARSECNX_BUILD="cpu")
    assert result.returncode != 0
    assert "SPARSECNX_BUILD=cpu: no C++ compiler: found none of /nowhere/c++" in result.stdout + result.stderr


@pytest.mark.parametrize("on", ["library.cpp", "build_info.cpp"])
def test_failed_compilation_leaves_neither_module(source: Path, tmp_path: Path, on: str) -> None:
    package = source / "sparsecnx"
    for stale in ("_C.abi3.so", "_build_info.so"):
        (package / stale).touch()
    environment = {**os.environ, "CXX": failing_compiler(tmp_path, on=on), "SPARSECNX_BUILD": "auto"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=source, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert compiled(package) == []
    missing = _extension.load(package)
    assert missing is not None
    assert f"compiling against torch {torch.__version__} failed" in missing.reason
    assert "WITHOUT its compiled operators" in result.stderr


def test_unknown_build_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECNX_BUILD", "fast")
    with pytest.raises(SystemExit, match="SPARSECNX_BUILD is 'fast': expected auto, cpu or none"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_old_torch_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    metadata = tmp_path / "torch-2.4.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.1\n")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"torch 2\.4\.1 is installed and sparsecnx needs 2\.11 or later"):
        runpy.run_path(str(ROOT / "setup.py"))


# Sees setuptools and the standard library alone, as in pip's build isolation; prints what `setup` gets.
ISOLATED = """
import json, os, runpy, site, sys
sys.path = [path for path in sys.path if path not in site.getsitepackages()] + [sys.argv[1]]
if sys.argv[2] == "without torch":
    site.getsitepackages = lambda: []
import setuptools
setuptools.setup = lambda **arguments: print(json.dumps({
    "extensions": [extension.name for extension in arguments.get("ext_modules", [])],
    "requires": arguments.get("setup_requires", []),
}))
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("torch_is", ["with torch", "without torch"])
def test_build_isolation_compiles_with_the_installed_torch(tmp_path: Path, torch_is: str) -> None:
    for name in ("setuptools", "_distutils_hack"):
        shutil.copytree(Path(setuptools.__file__).parents[1] / name, tmp_path / name)
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", ISOLATED, tmp_path, torch_is],
            cwd=ROOT,
            env={**os.environ, "SPARSECNX_BUILD": "auto"},
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    if torch_is == "with torch":
        assert found == {"extensions": ["sparsecnx._C", "sparsecnx._build_info"], "requires": []}
    else:
        assert found == {"extensions": [], "requires": ["torch>=2.11"]}


def test_operators_use_the_stable_abi_alone() -> None:
    if not _extension.loaded:
        pytest.skip(f"{_extension.why_not}")
    (library,) = _extension.PACKAGE.glob("_C.*so")
    needed = subprocess.check_output(["readelf", "--dynamic", library], text=True)
    assert "libtorch_python" not in needed and "libpython" not in needed
    symbols = subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True)
    assert "aoti_torch" in symbols
    assert re.findall(r"\b(?:c10|at|torch)::.*|\b_?Py[A-Z_]\w*", symbols) == []


def test_build_info_is_of_this_version() -> None:
    if not _extension.loaded:
        pytest.skip(f"{_extension.why_not}")
    facts = _extension.build_info()
    assert facts is not None
    assert facts["version"] == sparsecnx.__version__
    assert facts["oldest_torch"] == _extension.OLDEST_TORCH
    assert facts["compiler"] and facts["torch"]
    assert "-O3" in f"{facts['flags']}" and "-march" not in f"{facts['flags']}"


def test_library_that_does_not_load_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_text("not a library")
    missing = _extension.load(tmp_path)
    assert missing is not None
    assert "_C.abi3.so does not load into torch" in missing.reason
    assert missing.remedy.startswith("pip install --force-reinstall")


def test_folder_without_library(tmp_path: Path) -> None:
    missing = _extension.load(tmp_path)
    assert missing is not None
    assert missing.reason.startswith("not compiled")


def test_operators_refuse_an_older_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.abi3.so").touch()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    missing = _extension.load(tmp_path)
    assert missing == _extension.Missing(
        "the compiled operators need torch 2.11 or later, this is 2.9.1", "pip install --upgrade torch"
    )
