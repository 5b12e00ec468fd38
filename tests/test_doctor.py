"""`sparsecnx doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import needs_triton

import sparsecnx
from sparsecnx import doctor, ops
from sparsecnx.backends import compiled, cuda, triton_launch


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


def test_report_covers_everything() -> None:
    report = doctor.report()
    assert report.startswith(f"sparsecnx {sparsecnx.__version__}\n")
    for name in ("Python", "torch", "GPU", "Triton", "CPU operators", "CUDA operators", "MinkowskiEngine"):
        assert len(re.findall(rf"^(?:ok|--)  {name} ", report, re.MULTILINE)) == 1
    assert torch.__version__ in report


def test_everything_missing_comes_with_a_reason_and_a_remedy() -> None:
    for found in doctor.checks():
        assert found.detail
        assert found.ok or found.remedy, found


def test_lines_are_aligned() -> None:
    columns = set()
    for line in doctor.report().splitlines()[2:]:
        assert len(line) <= 180
        entry = re.match(r"(?:ok|--)  \S+(?: \S+)* {2,}|  +-> | {10,}", line)
        assert entry, line
        columns.add(entry.end() - (3 if entry[0].endswith("-> ") else 0))
    assert len(columns - {max(columns)}) == (len(columns) > 1)  # more than one: commands go on under their beginning


def test_compiled_operators() -> None:
    found = check("CPU operators")
    assert found.ok == compiled.loaded
    facts = compiled.build_info()
    if facts is None:
        assert found.detail == compiled.why_not
    else:
        assert f"{facts['compiler']}" in found.detail and f"{facts['torch']}" in found.detail


def test_version_mismatch_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled.loaded:
        pytest.skip(f"{compiled.why_not}")
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
    break_import(monkeypatch, "tqdm", RuntimeError("no terminal"))
    found = check("tqdm")
    assert found.detail == "installed, but does not import: no terminal"
    assert found.remedy == "pip install --force-reinstall --no-deps tqdm"


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "triton", ModuleNotFoundError("No module named 'triton'", name="triton"))
    found = check("Triton")
    assert not found.ok
    assert found.detail == "not installed"
    assert found.remedy is not None and "CUDA build of torch" in found.remedy


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Pretend to have GPUs of these compute capabilities and no Triton interpreter."""
    monkeypatch.setattr(triton_launch, "interpreting", False)
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
    monkeypatch.setattr(triton_launch, "interpreting", True)
    found = doctor._triton_kernels()
    assert found.ok and "interpreter" in found.detail
    assert found.remedy is not None and "TRITON_INTERPRET" in found.remedy


def test_cuda_operators_of_this_install() -> None:
    found = check("CUDA operators")
    assert found.ok or not compiled.cuda_loaded or torch.cuda.is_available()
    if not compiled.cuda_loaded:
        assert found == doctor.Check("CUDA operators", False, f"{compiled.cuda_why_not}", compiled.cuda_remedy)


BUILT = {
    "version": sparsecnx.__version__,
    "compiler": "GCC 12.2.0",
    "flags": "-O3",
    "torch": "2.99.0",
    "oldest_torch": "2.11",
    "cuda": "13.0",
    "cuda_architectures": "8.0;9.0+PTX",
    "cuda_flags": "-O3 -std=c++20",
}


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend to be built with GPU operators, with a driver for CUDA 13.0."""
    monkeypatch.setattr(compiled, "cuda_loaded", True)
    monkeypatch.setattr(compiled, "build_info", lambda: dict(BUILT))
    monkeypatch.setattr(cuda, "driver_version", lambda: (13, 0))
    cuda._unserved.cache_clear()
    return monkeypatch


@pytest.mark.parametrize(
    ("capabilities", "ok", "end"),
    [
        ((), True, "; there is no GPU to run them on"),
        (((8, 9), (9, 0), (12, 0)), True, "; they run on the GPU"),
        (((7, 5),), False, "; CUDA operators are built for 8.0;9.0+PTX, cuda:0 has compute capability 7.5"),
        (((9, 0), (7, 5)), True, "; CUDA operators are built for 8.0;9.0+PTX, cuda:1 has compute capability 7.5"),
    ],
    ids=["no GPU", "served", "old", "both"],
)
def test_gpus_that_the_cuda_operators_serve(
    with_cuda: pytest.MonkeyPatch, capabilities: tuple[tuple[int, int], ...], ok: bool, end: str
) -> None:
    gpus(with_cuda, *capabilities)
    found = doctor._cuda_operators()
    assert found.detail == (
        "architectures 8.0;9.0+PTX; compiled by nvcc 13.0 (-O3 -std=c++20) with torch 2.99.0 for 2.11 and later" + end
    )
    assert found.ok == ok
    assert found.remedy == ("They are made for compute capability 8.0 and later." if "7.5" in end else None)


def test_gpus_newer_than_the_machine_code(with_cuda: pytest.MonkeyPatch) -> None:
    with_cuda.setattr(compiled, "build_info", lambda: {**BUILT, "cuda_architectures": "8.0"})
    gpus(with_cuda, (9, 0), (8, 6))
    found = doctor._cuda_operators()
    assert found.ok and found.detail.endswith("; CUDA operators are built for 8.0, cuda:0 has compute capability 9.0")
    assert found.remedy == f"TORCH_CUDA_ARCH_LIST='8.6;9.0' {compiled.reinstall(build='cuda')}"


def test_cuda_operators_with_an_old_driver(with_cuda: pytest.MonkeyPatch) -> None:
    gpus(with_cuda, (9, 0))
    with_cuda.setattr(cuda, "driver_version", lambda: (12, 4))
    found = doctor._cuda_operators()
    assert not found.ok and found.detail.endswith("; the driver is for CUDA 12.4, which is too old for them")
    assert found.remedy is not None and found.remedy.startswith("Update the NVIDIA driver")


@pytest.mark.parametrize(
    ("facts", "detail"),
    [
        (None, "compiled from sparsecnx (unknown version)"),
        ({**BUILT, "version": "9.9.9"}, "compiled from sparsecnx 9.9.9"),
        ({**BUILT, "cuda": None}, "left from another build than the CPU operators"),
    ],
    ids=["unknown", "version", "build"],
)
def test_cuda_operators_of_another_build(
    with_cuda: pytest.MonkeyPatch, facts: dict[str, str | None] | None, detail: str
) -> None:
    with_cuda.setattr(compiled, "build_info", lambda: facts)
    found = doctor._cuda_operators()
    assert (found.ok, found.detail) == (False, detail)
    assert found.remedy is not None and found.remedy.startswith("SPARSECNX_BUILD=cuda pip install")


def test_explanation_covers_every_operator_at_every_stage() -> None:
    names = [operator.name for operator in doctor.EXPLAINED_OPERATORS]
    public = {name for name in ops.__all__ if not name.startswith("mapped_")} - {"BlockParameters", "draw_survival"}
    assert set(names) == {*public, "patchify", "unpatchify"}
    lines = doctor.explain(torch.device("cpu"), torch.float32, "tiny").splitlines()
    table = [line.split() for line in lines[3 : lines.index("", 2)]]
    stages = list(zip(("96", "192", "384", "768"), ("8", "4", "2", "1"), strict=True))
    fast = "cpu" if compiled.loaded else "reference"
    assert [tuple(line[:4]) for line in table] == [
        (name, *stage, "torch" if "patchify" in name and not compiled.loaded else fast)
        for name, stage in product(names, stages)
    ]
    assert all("the fastest that can run" in " ".join(line) for line in table)
    assert {line[0] for line in table if "otherwise torch.batch_norm runs" in " ".join(line)} == {"batch_norm"}


@pytest.mark.skipif(not compiled.loaded, reason=f"{compiled.why_not}")
def test_explanation_of_the_hidden_layer() -> None:
    pico, tiny = (doctor.explain(torch.device("cpu"), torch.float32, size) for size in ("pico", "tiny"))
    blocks = [line for line in pico.splitlines() if line.startswith("convnextv2_block ")]
    assert ["recomputed in backward" in line for line in blocks] == [True, False, False, False]
    assert "recomputed in backward" not in tiny


def test_explanation_says_why_the_others_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "loaded", False)
    monkeypatch.setattr(compiled, "why_not", "no C++ compiler")
    report = doctor.explain(torch.device("cpu"), torch.bfloat16, "atto")
    names = [operator.name for operator in doctor.EXPLAINED_OPERATORS if "cpu" in operator.implementations]
    assert f"cpu: no C++ compiler\n    {', '.join(names)}" in report
    assert "triton: Triton kernels run on the CPU only when asked for by name" in report
    assert "minkowski: runs only where it is asked for by name" in report
    assert "What runs on cpu in bfloat16, in the four stages of ConvNeXt V2 Atto" in report


def test_version_of_a_module_that_another_distribution_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    modules = {"triton": ModuleType("triton"), "MinkowskiEngine": ModuleType("MinkowskiEngine")}
    modules["MinkowskiEngine"].__version__ = "0.5.4"  # type: ignore[attr-defined]
    modules["MinkowskiEngine"].is_cuda_available = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", modules["MinkowskiEngine"])
    monkeypatch.setattr(importlib.metadata, "version", version)
    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or original(name))
    assert check("Triton").detail.startswith("version unknown")
    assert check("MinkowskiEngine").detail.startswith("0.5.4, ")


@pytest.mark.parametrize(
    ("cuda", "fork", "built"),
    [
        (False, False, "built for the CPU only"),
        (True, False, "built for CUDA too"),
        (True, True, "built for CUDA too, with a depthwise kernel"),
    ],
    ids=["CPU", "CUDA", "fork"],
)
def test_minkowski_engine(monkeypatch: pytest.MonkeyPatch, cuda: bool, fork: bool, built: str) -> None:
    library: Any = ModuleType("MinkowskiEngine")
    library.__version__ = "0.5.4"
    library.is_cuda_available = lambda: cuda
    if fork:
        library.MinkowskiDepthwiseConvolution = object
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", library)
    detail = f"{doctor._version('MinkowskiEngine', 'MinkowskiEngine')}, {built}; the backend `minkowski` runs on it"
    assert check("MinkowskiEngine") == doctor.Check("MinkowskiEngine", True, detail)


ABSENT = ModuleNotFoundError("No module named 'MinkowskiEngine'", name="MinkowskiEngine")


@pytest.mark.parametrize(
    ("error", "detail", "begins"),
    [
        (ABSENT, "not installed", "For the CPU, with g++ and OpenBLAS: pip install "),
        (
            ImportError("undefined symbol: _ZN3c10"),
            "installed, but does not import: undefined symbol: _ZN3c10",
            "Compile it for this torch and Python. For the CPU, with g++ and OpenBLAS: pip install ",
        ),
    ],
    ids=["absent", "another torch"],
)
def test_minkowski_engine_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str, begins: str
) -> None:
    """The remedy is for the environment that looked for it."""
    monkeypatch.delitem(sys.modules, "MinkowskiEngine", raising=False)
    monkeypatch.setattr(sys, "version_info", (3, 11, 2))
    break_import(monkeypatch, "MinkowskiEngine", error)
    found = doctor._minkowski_engine()
    assert (found.ok, found.detail) == (False, detail)
    assert found.remedy is not None and found.remedy.startswith(begins)
    assert "CUDA_VISIBLE_DEVICES= pip install --force-reinstall " in found.remedy
    assert found.remedy.endswith("in a checkout of sparsecnx `make minkowski` makes an environment of its own.")


@pytest.mark.parametrize("version", [(3, 12, 0), (3, 13, 1)], ids=str)
def test_minkowski_engine_and_a_python_that_it_does_not_compile_with(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.delitem(sys.modules, "MinkowskiEngine", raising=False)
    monkeypatch.setattr(sys, "version_info", version)
    break_import(monkeypatch, "MinkowskiEngine", ABSENT)
    remedy = doctor._minkowski_engine().remedy
    assert remedy is not None and remedy.startswith("It compiles with Python 3.10 and 3.11 alone: ")
    assert "pip install" not in remedy and remedy.endswith("with PYTHON=python3.11.")


def test_minkowski_engine_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    assert check("MinkowskiEngine").detail == "not installed"


def test_our_api_under_the_name_of_minkowski_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", importlib.import_module("sparsecnx.compat.minkowski"))
    found = check("MinkowskiEngine")
    assert (found.ok, found.detail) == (False, "answered by sparsecnx.compat.minkowski in this process")
    assert (
        found.remedy
        == "For the library itself: sparsecnx.compat.minkowski.uninstall(), or a process without install()."
    )
