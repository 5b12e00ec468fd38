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
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

import sparsecnx
from sparsecnx import doctor
from sparsecnx.backends import compiled

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fresh source folder, with operators that compile in a second."""
    folder = tmp_path / "source"
    binaries = shutil.ignore_patterns("*.so", "_build_failure*.txt", "__pycache__")
    shutil.copytree(ROOT / "sparsecnx", folder / "sparsecnx", ignore=binaries)
    (folder / "csrc/cuda").mkdir(parents=True)
    (folder / "csrc/library.cpp").write_text("int nothing;\n")
    (folder / "csrc/cuda/library.cpp").write_text("int kernel();\nint nothing = kernel();\n")
    (folder / "csrc/cuda/library.cu").write_text('#include "kernel.cuh"\nint kernel() { return value; }\n')
    (folder / "csrc/cuda/kernel.cuh").write_text("const int value = 1;\n")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "csrc/build_info.cpp",
        "csrc/find_nvcc.py",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


TORCH_CUDA = torch.version.cuda or "13.0"
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built for CPU only")


def fake_toolkit(folder: Path, *, release: str = TORCH_CUDA, library: bool = True) -> Path:
    """A CUDA toolkit whose nvcc takes kernels for C++, and does not compile a file that says `error`."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    if library:
        (folder / "lib/libcudart_static.a").write_text("!<arch>\n")
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *compute_70*) echo \"nvcc fatal   : Unsupported gpu architecture 'compute_70'\"; exit 1;;\n"
        f"  *--version*) echo 'Cuda compilation tools, release {release}, V{release}.88'; exit;;\n"
        f"""  *--dryrun*) echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}/bin/../lib"' >&2; exit;;\n"""
        "esac\n"
        'while [ "$1" != -c ]; do shift; done\n'
        'if grep -q error "$2"; then echo "$2(1): error: no such thing"; exit 1; fi\n'
        'exec c++ -fPIC -x c++ -c "$2" -o "$4"\n'
    )
    nvcc.chmod(0o755)
    return folder


def build_in_place(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What an editable install does."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )


def build_facts(package: Path) -> dict[str, str | None]:
    """What the module _build_info in that folder says."""
    program = "import json, torch, _build_info; print(json.dumps(_build_info.facts))"
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", program]
    facts: dict[str, str | None] = json.loads(subprocess.check_output(command, env=environment, text=True))
    return facts


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which sets up nothing."""
    monkeypatch.setenv("SPARSECNX_BUILD", "none")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def torch_of(cuda: str | None) -> SimpleNamespace:
    """All of a torch that the search for a toolkit looks at."""
    return SimpleNamespace(__version__="2.99.0", version=SimpleNamespace(cuda=cuda))


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
    for stale in ("_C.abi3.so", "_C_cuda.abi3.so", "_build_info.so", "_build_failure_cuda.txt"):
        (package / stale).touch()
    environment = {"CXX": failing_compiler(tmp_path, on=on), "SPARSECNX_BUILD": "auto"}
    result = build_in_place(source, **environment)
    assert result.returncode == 0, result.stderr
    assert compiled(package) == []
    missing = compiled.load(package)
    assert missing is not None
    assert f"compiling against torch {torch.__version__} failed" in missing.reason
    assert "WITHOUT its compiled operators" in result.stderr
    assert not (package / "_build_failure_cuda.txt").exists()


@needs_cuda_torch
def test_gpu_operators_are_built_where_nvcc_fits(source: Path, tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda")
    installed = tmp_path / "installed"
    environment = {"CUDA_HOME": str(toolkit), "SPARSECNX_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ""}
    result = pip("install", source, "--target", installed, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    cpu, gpu, _ = compiled(installed / "sparsecnx")
    assert (cpu, gpu) == ("_C.abi3.so", "_C_cuda.abi3.so")
    facts = build_facts(installed / "sparsecnx")
    assert (facts["cuda"], facts["cuda_architectures"]) == (TORCH_CUDA, "8.0;9.0+PTX")
    assert "-O3" in f"{facts['cuda_flags']}"

    # The CPU operators alone, from the same folder: nothing of the others is left in the wheel.
    result = pip("wheel", source, "--wheel-dir", tmp_path, SPARSECNX_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "cuda.abi3" in name or "_build_failure" in name]


@needs_cuda_torch
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_kernels_that_do_not_compile(source: Path, tmp_path: Path, mode: str) -> None:
    (source / "csrc/cuda/kernel.cuh").write_text("")
    (source / "csrc/cuda/library.cu").write_text("error\n")
    package = source / "sparsecnx"
    (package / "_C_cuda.abi3.so").write_text("of an earlier install")
    result = build_in_place(source, CUDA_HOME=str(fake_toolkit(tmp_path / "cuda")), SPARSECNX_BUILD=mode)
    reason = f"nvcc {TORCH_CUDA} on csrc/cuda/library.cu: csrc/cuda/library.cu(1): error: no such thing"
    if mode == "cuda":  # an error, and what was installed before stays
        assert result.returncode != 0 and reason in result.stderr
        assert compiled(package) == ["_C_cuda.abi3.so"]
        return
    assert result.returncode == 0, result.stderr
    cpu, _ = compiled(package)
    assert cpu == "_C.abi3.so"
    assert build_facts(package)["cuda"] is None
    missing = compiled.load_cuda(package)
    assert missing is not None
    assert missing.reason == f"not compiled because: compiling against torch {torch.__version__} failed: {reason}"
    assert "SPARSECNX_BUILD=cuda pip install" in missing.remedy and "WITHOUT" not in result.stderr
    assert "without its GPU operators" in result.stderr


HOST_CONFIG = (
    "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
)


@needs_cuda_torch
@pytest.mark.parametrize(
    ("mode", "architectures", "kernel", "remedy"),
    [
        ("auto", "7.0;9.0", "", "Set or shorten TORCH_CUDA_ARCH_LIST, now '7.0;9.0', to what this nvcc compiles for."),
        ("cuda", "9.0", HOST_CONFIG, "Set CXX to a g++ that this nvcc takes."),
    ],
    ids=["architecture", "compiler"],
)
def test_errors_of_nvcc_come_with_advice(
    source: Path, tmp_path: Path, mode: str, architectures: str, kernel: str, remedy: str
) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda")
    if kernel:
        nvcc = toolkit / "bin/nvcc"
        nvcc.write_text(nvcc.read_text().replace("error: no such thing", kernel))
        (source / "csrc/cuda/library.cu").write_text("error\n")
    environment = {"CUDA_HOME": str(toolkit), "SPARSECNX_BUILD": mode, "TORCH_CUDA_ARCH_LIST": architectures}
    result = build_in_place(source, **environment)
    assert (result.returncode == 0) == (mode == "auto"), result.stderr
    if mode == "cuda":
        said = result.stderr.splitlines()
        assert said[-1] == remedy
        assert said[-2].startswith(f"SPARSECNX_BUILD=cuda: nvcc {TORCH_CUDA} on csrc/cuda/library.cu: ")
    else:
        missing = compiled.load_cuda(source / "sparsecnx")
        assert missing is not None and missing.remedy.startswith(f"{remedy} Then: SPARSECNX_BUILD=cuda pip install")
        assert remedy not in missing.reason


@needs_cuda_torch
def test_a_rebuild_links_anew(source: Path, tmp_path: Path) -> None:
    """Without ninja too, which knows of headers and flags; then setuptools alone decides what is out of date."""
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    environment = {
        "CUDA_HOME": str(fake_toolkit(tmp_path / "cuda")),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    package = source / "sparsecnx"
    assert build_in_place(source, SPARSECNX_BUILD="cpu", **environment).returncode == 0
    assert build_facts(package)["cuda"] is None
    result = build_in_place(source, SPARSECNX_BUILD="cuda", **environment)
    assert result.returncode == 0 and "ninja" in result.stderr, result.stderr
    assert build_facts(package)["cuda"] == TORCH_CUDA
    before = (package / "_C_cuda.abi3.so").read_bytes()
    (source / "csrc/cuda/kernel.cuh").write_text("const int value = 2;\n")
    assert build_in_place(source, SPARSECNX_BUILD="cuda", **environment).returncode == 0
    assert (package / "_C_cuda.abi3.so").read_bytes() != before


@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_a_rebuild_compiles_what_changed_alone(source: Path) -> None:
    assert build_in_place(source, SPARSECNX_BUILD="cpu").returncode == 0
    times = {path: path.stat().st_mtime_ns for path in (source / "build").rglob("*.o")}
    assert times and build_in_place(source, SPARSECNX_BUILD="cpu").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


@needs_cuda_torch
def test_mismatched_nvcc_costs_the_gpu_operators_alone(source: Path, tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", release="10.2")
    installed = tmp_path / "installed"
    result = pip("install", source, "--target", installed, CUDA_HOME=str(toolkit), SPARSECNX_BUILD="cuda")
    assert result.returncode != 0 and not installed.exists()
    assert f"SPARSECNX_BUILD=cuda: {toolkit}/bin/nvcc is of CUDA 10.2, torch" in result.stdout + result.stderr
    assert build_in_place(source, CUDA_HOME=str(toolkit), SPARSECNX_BUILD="cuda").returncode != 0

    result = build_in_place(source, CUDA_HOME=str(toolkit), SPARSECNX_BUILD="auto")
    assert result.returncode == 0, result.stderr
    cpu, _ = compiled(source / "sparsecnx")
    assert cpu == "_C.abi3.so"
    missing = compiled.load_cuda(source / "sparsecnx")
    assert missing is not None and "nvcc is of CUDA 10.2" in missing.reason
    assert missing.remedy.startswith(f"Install the CUDA {TORCH_CUDA.partition('.')[0]} toolkit")


def test_toolkit_without_its_runtime_library(recipe: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", release="13.0", library=False)))
    with pytest.raises(recipe["CannotCompile"]) as error:
        recipe["find_toolkit"](torch_of("13.0"))
    reason, remedy = str(error.value).split("\n")
    assert reason == (
        f"the toolkit of {tmp_path}/cuda/bin/nvcc lacks libcudart_static.a: "
        f"looked in {tmp_path}/cuda/stubs, {tmp_path}/cuda/lib"
    )
    assert "cuda-cudart-dev-13-0" in remedy


def test_toolkit_behind_a_script_on_the_path(recipe: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", release="13.1")
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = recipe["find_toolkit"](torch_of("13.0"))
    assert found.nvcc == str(script)
    assert found.version == "13.1"  # another minor version than torch's does no harm
    assert found.cudart == f"{toolkit}/lib/libcudart_static.a"


def test_no_toolkit(recipe: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    search = runpy.run_path(str(ROOT / "csrc/find_nvcc.py"))
    monkeypatch.setitem(search["find_nvcc"].__globals__, "USUAL_TOOLKIT", tmp_path / "usual")
    monkeypatch.setattr(runpy, "run_path", lambda path: search)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(recipe["CannotCompile"]) as error:
        recipe["find_toolkit"](torch_of("13.0"))
    reason, remedy = str(error.value).split("\n")
    assert reason == f"no nvcc: looked in CUDA_HOME=/nowhere, PATH, {tmp_path}/usual"
    assert remedy.startswith("Install the CUDA 13 toolkit") and "set CUDA_HOME" in remedy


def test_make_finds_the_toolkit_that_setup_finds(recipe: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    """Not on the PATH: by CUDA_HOME alone."""
    toolkit = fake_toolkit(tmp_path / "cuda", release="13.2")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.delenv("SPARSECNX_BUILD")
    assert recipe["find_toolkit"](torch_of("13.0")).nvcc == f"{toolkit}/bin/nvcc"
    command = ["make", "--dry-run", "clean", f"PYTHON={sys.executable}"]
    assert f"SPARSECNX_BUILD=cuda ({toolkit}/bin/nvcc)\n" in subprocess.check_output(command, cwd=ROOT, text=True)
    fake_toolkit(tmp_path / "old", release="12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    assert "SPARSECNX_BUILD=cpu (" in subprocess.check_output(command, cwd=ROOT, text=True)


def test_torch_without_cuda_compiles_no_kernels(recipe: dict[str, Any]) -> None:
    with pytest.raises(recipe["CannotCompile"], match=r"torch 2\.99\.0 is not built for CUDA\nInstall a CUDA build"):
        recipe["find_toolkit"](torch_of(None))


def test_architectures(recipe: dict[str, Any]) -> None:
    flags = recipe["architecture_flags"]
    (sm_80, sm_90, ptx) = flags("8.0;9.0+PTX")
    assert sm_80 == "-gencode=arch=compute_80,code=sm_80"
    assert (sm_90, ptx) == ("-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90")
    assert flags("9.0a 12.0") == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=sm_120"]
    with pytest.raises(recipe["CannotCompile"], match="TORCH_CUDA_ARCH_LIST is 'Hopper': 'Hopper' is no compute"):
        flags("Hopper")


def test_source_distribution_installs(source: Path, tmp_path: Path) -> None:
    """The kernels' headers are in it, and a compiler finds them."""
    toolkit = fake_toolkit(tmp_path / "cuda")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
    built = subprocess.run(command, cwd=source, text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    installed = tmp_path / "installed"
    mode = "cpu" if torch.version.cuda is None else "cuda"
    result = pip("install", archive, "--target", installed, CUDA_HOME=str(toolkit), SPARSECNX_BUILD=mode)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(compiled(installed / "sparsecnx")) == (2 if mode == "cpu" else 3)


def test_source_distribution_has_all_sources(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "csrc")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
    built = subprocess.run(command, cwd=source, text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names


def test_unknown_build_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECNX_BUILD", "fast")
    with pytest.raises(SystemExit, match="SPARSECNX_BUILD is 'fast': expected auto, cpu, cuda or none"):
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
            env={**os.environ, "SPARSECNX_BUILD": "cpu"},
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    if torch_is == "with torch":
        assert found == {"extensions": ["sparsecnx._C", "sparsecnx._build_info"], "requires": []}
    else:
        assert found == {"extensions": [], "requires": ["torch>=2.11"]}


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_operators_use_the_stable_abi_alone(name: str) -> None:
    library = compiled.find(name)
    if library is None:
        pytest.skip(f"{compiled.why_not if name == '_C' else compiled.cuda_why_not}")
    dynamic = subprocess.check_output(["readelf", "--dynamic", library], text=True)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert not {item for item in needed if item.startswith(("libtorch_python", "libpython", "libcudart"))}
    symbols = subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True)
    assert "aoti_torch" in symbols
    assert re.findall(r"\b(?:c10|at|torch)::.*|\b_?Py[A-Z_]\w*|\bcu(?:da)?[A-Z]\w*", symbols) == []
    if name == "_C_cuda":
        assert "libtorch_cuda.so" in needed
        # The runtime inside is its own: neither does torch's take its place, nor the other way round.
        offered = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
        assert re.findall(r"\bcuda[A-Z]\w*", offered) == []


def test_gpu_operators_hold_code_for_the_architectures_they_name() -> None:
    facts = compiled.build_info() or {}
    library = compiled.find("_C_cuda")
    if library is None or not facts.get("cuda"):
        pytest.skip(f"{compiled.cuda_why_not}")
    content = library.read_bytes()
    names = [name.partition("+")[0].replace(".", "") for name in re.split("[; ,]+", f"{facts['cuda_architectures']}")]
    assert all(f"sm_{name}".encode() in content for name in names)


def test_gpu_operators_need_a_cuda_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    missing = compiled.load_cuda(tmp_path)
    assert missing is not None
    assert missing.reason == "this torch is built for CPU only" and "Install a CUDA build" in missing.remedy


@needs_cuda_torch
def test_gpu_library_that_does_not_load_is_no_crash(tmp_path: Path) -> None:
    missing = compiled.load_cuda(tmp_path)
    assert missing is not None and missing.reason.startswith("not compiled")
    (tmp_path / "_C_cuda.abi3.so").write_text("not a library")
    missing = compiled.load_cuda(tmp_path)
    assert missing is not None
    assert "_C_cuda.abi3.so does not load into torch" in missing.reason
    assert missing.remedy.startswith("SPARSECNX_BUILD=cuda pip install --force-reinstall")


def test_libraries_of_an_earlier_version_are_no_crash(tmp_path: Path) -> None:
    """As in a source folder after `git pull`: without the operators that came since."""
    package = tmp_path / "sparsecnx"
    binaries = shutil.ignore_patterns("*.so", "_build_failure*.txt", "__pycache__")
    shutil.copytree(ROOT / "sparsecnx", package, ignore=binaries)
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", package / "_C.abi3.so"],
        input="int nothing;",
        text=True,
        check=True,
    )
    program = "import sparsecnx.backends.compiled as e; print(e.loaded, e.why_not, e.remedy, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).splitlines()
    assert said[0] == "False"
    assert said[1].startswith("_C.abi3.so is of another version of sparsecnx: it lacks sparsecnx::cpu_isa, ")
    assert "sparsecnx_cuda::tile_index" in said[1]
    assert said[2].startswith("pip install --force-reinstall")


@needs_cuda_torch
def test_gpu_operators_without_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of the GPU left from an earlier version, beside one of the CPU of this version."""
    (tmp_path / "_C_cuda.abi3.so").touch()
    monkeypatch.setattr(compiled, "register", lambda library, remedy: None)
    lacking = "sparsecnx_cuda::tile_index"
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name != lacking)
    missing = compiled.load_cuda(tmp_path)
    assert missing is not None and missing.remedy.startswith("SPARSECNX_BUILD=cuda pip install")
    assert missing.reason == f"_C_cuda.abi3.so is of another version of sparsecnx: it lacks {lacking}"


def test_operators_of_this_version_are_those_of_the_library() -> None:
    text = (ROOT / "csrc/library.cpp").read_text()
    blocks = re.findall(r"^STABLE_TORCH_LIBRARY\((\w+), m\) {(.*?)^}", text, re.MULTILINE | re.DOTALL)
    found = {library: re.findall(r'm\.def\(\s*"(\w+)', body) for library, body in blocks}
    assert found == {"sparsecnx": compiled.OPERATORS, "sparsecnx_cuda": compiled.CUDA_OPERATORS}


def test_build_info_is_of_this_version() -> None:
    if not compiled.loaded:
        pytest.skip(f"{compiled.why_not}")
    facts = compiled.build_info()
    assert facts is not None
    assert facts["version"] == sparsecnx.__version__
    assert facts["oldest_torch"] == compiled.OLDEST_TORCH
    assert facts["compiler"] and facts["torch"]
    assert "-O3" in f"{facts['flags']}" and "-march" not in f"{facts['flags']}"


def test_library_that_does_not_load_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_text("not a library")
    missing = compiled.load(tmp_path)
    assert missing is not None
    assert "_C.abi3.so does not load into torch" in missing.reason
    assert missing.remedy.startswith("pip install --force-reinstall")


def test_folder_without_library(tmp_path: Path) -> None:
    missing = compiled.load(tmp_path)
    assert missing is not None
    assert missing.reason.startswith("not compiled")


def test_operators_refuse_an_older_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.abi3.so").touch()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    missing = compiled.load(tmp_path)
    assert missing == compiled.Missing(
        "the compiled operators need torch 2.11 or later, this is 2.9.1", "pip install --upgrade torch"
    )
