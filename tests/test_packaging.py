"""Test what an install builds, what it records where it cannot, and how the compiled operators are loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import setuptools
import torch

import sparsecnx
from sparsecnx import doctor
from sparsecnx.backends import compiled

ROOT = Path(__file__).parents[1]
TORCH_CUDA = torch.version.cuda or "13.0"
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built for CPU only")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make a fresh source folder whose operators compile in a second."""
    folder = tmp_path / "source"
    binaries = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "sparsecnx", folder / "sparsecnx", ignore=binaries)
    (folder / "csrc/cuda").mkdir(parents=True)
    (folder / "csrc/library.cpp").write_text('#include "value.h"\nint nothing = value;\n')
    (folder / "csrc/value.h").write_text("const int value = 1;\n")
    (folder / "csrc/cuda/library.cpp").write_text("int kernel();\nint nothing = kernel();\n")
    (folder / "csrc/cuda/kernel.cu").write_text('#include "kernel.cuh"\nint kernel() { return value; }\n')
    (folder / "csrc/cuda/kernel.cuh").write_text("const int value = 1;\n")
    files = [path.name for path in ROOT.iterdir() if path.is_file()]
    for name in [*files, *(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.py"))]:
        shutil.copy(ROOT / name, folder / name)
    return folder


def fake_toolkit(folder: Path, *, release: str = TORCH_CUDA, library: bool = True) -> Path:
    """Make a CUDA toolkit whose nvcc compiles kernels as C++, fails on a file that says `error`, and knows no sm_70."""
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
        f"""  *--verbose*) echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}/bin/../lib"';;\n"""
        "esac\n"
        'while [ $# -gt 0 ]; do\n  case "$1" in -c) source=$2;; -o) object=$2;; -MF) listed=$2;; esac\n  shift\ndone\n'
        'if grep -q error "$source"; then echo "$source(1): error: no such thing"; exit 1; fi\n'
        'exec c++ -fPIC -x c++ ${listed:+-MD -MF "$listed"} -c "$source" -o "$object"\n'
    )
    nvcc.chmod(0o755)
    return folder


def failing_compiler(folder: Path) -> str:
    """Make a C++ compiler that fails on library.cpp."""
    script = folder / "c++"
    script.write_text('#!/bin/sh\ncase "$*" in *library.cpp*) echo "error: no"; exit 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "", "PYTHONPATH": "", **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, text=True, capture_output=True)


def build_in_place(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run what an editable install runs."""
    return run("setup.py", "build_ext", "--inplace", cwd=source, **environment)


def pip(command: str, what: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pip` without build isolation: the environment of the tests has all that a build needs."""
    options = ("--no-build-isolation", "--no-deps")
    return run("-m", "pip", command, what, *options, *arguments, cwd=what.parent, **environment)


def libraries(package: Path) -> list[str]:
    return sorted(path.name for path in package.glob("*.so"))


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "csrc")
    return importlib.import_module("compilers")


def torch_of(cuda: str | None) -> Any:
    """Return all of a torch that the search for a toolkit reads."""
    extension = SimpleNamespace(CUDA_HOME=None)
    version = SimpleNamespace(cuda=cuda)
    return SimpleNamespace(__version__="2.99.0", version=version, utils=SimpleNamespace(cpp_extension=extension))


def test_pure_python_wheel(source: Path, tmp_path: Path) -> None:
    """Its metadata asks for torch alone, and `doctor` knows what the extra [train] adds."""
    result = pip("wheel", source, "--wheel-dir", tmp_path, SPARSECNX_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sparsecnx-{sparsecnx.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsecnx/doctor.py" in names and "sparsecnx/py.typed" in names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
    metadata = zipfile.Path(wheel, f"sparsecnx-{sparsecnx.__version__}.dist-info/")
    requires = importlib.metadata.PathDistribution(metadata).requires or []
    assert [item for item in requires if "extra ==" not in item] == ["torch>=2.11"]
    train = [re.split(r"[;\[]", item)[0].strip() for item in requires if re.search("extra == .train.", item)]
    assert sorted(train) == sorted(doctor.TRAIN)


def test_one_wheel_serves_every_python(source: Path, tmp_path: Path) -> None:
    """Nothing of an earlier editable install is in it."""
    for stale in ("_C_cuda.abi3.so", "_build.json"):
        (source / "sparsecnx" / stale).write_text("stale")
    result = pip("wheel", source, "--wheel-dir", tmp_path, SPARSECNX_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"sparsecnx-{sparsecnx.__version__}-cp310-abi3-")
    archive = zipfile.ZipFile(wheel)
    assert [name for name in archive.namelist() if name.endswith(".so")] == ["sparsecnx/_C.abi3.so"]
    facts = json.loads(archive.read("sparsecnx/_build.json"))
    assert (facts["version"], facts["torch"]) == (sparsecnx.__version__, torch.__version__)
    assert facts["cuda"] is None and facts["cpu_failure"] is None
    digest = hashlib.blake2b(archive.read("sparsecnx/_C.abi3.so")).hexdigest()
    assert facts["libraries"]["_C.abi3.so"]["blake2b"] == digest


def test_without_a_compiler_the_install_succeeds_and_doctor_says_why(source: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    result = pip("install", source, "--target", installed, CXX="/nowhere/c++", SPARSECNX_BUILD="auto")
    assert result.returncode == 0, result.stderr
    program = "import sparsecnx.doctor; print(sparsecnx.doctor.__file__); print(sparsecnx.doctor.report())"
    report = run("-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert str(installed) in report and libraries(installed / "sparsecnx") == []
    assert "not compiled: no C++ compiler: found none of /nowhere/c++" in report and "-> Install g++" in report

    result = pip("install", source, "--target", tmp_path / "other", CXX="/nowhere/c++", SPARSECNX_BUILD="cpu")
    assert result.returncode != 0
    assert "SPARSECNX_BUILD=cpu: no C++ compiler: found none of /nowhere/c++" in result.stdout + result.stderr


def test_a_failed_compilation_leaves_no_library(source: Path, tmp_path: Path) -> None:
    package = source / "sparsecnx"
    for stale in ("_C.abi3.so", "_C_cuda.abi3.so", "_build.json"):
        (package / stale).touch()
    result = build_in_place(source, CXX=failing_compiler(tmp_path), SPARSECNX_BUILD="auto")
    assert result.returncode == 0 and "WITHOUT its compiled operators" in result.stderr, result.stderr
    assert libraries(package) == []
    missing = compiled.load(package)
    assert missing is not None and f"compiling against torch {torch.__version__} failed" in missing.reason
    assert missing.remedy.startswith(
        "Install with SPARSECNX_BUILD=cpu to see the compiler's messages. Then: pip install"
    )


@needs_cuda_torch
def test_gpu_operators_are_built_where_nvcc_fits(source: Path, tmp_path: Path) -> None:
    installed, toolkit = tmp_path / "installed", fake_toolkit(tmp_path / "cuda")
    result = pip("install", source, "--target", installed, CUDA_HOME=str(toolkit), SPARSECNX_BUILD="cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    assert libraries(installed / "sparsecnx") == ["_C.abi3.so", "_C_cuda.abi3.so"]
    facts = compiled.build_info(installed / "sparsecnx") or {}
    assert (facts["cuda"], facts["cuda_architectures"]) == (TORCH_CUDA, "8.0;9.0+PTX")
    assert "-O3" in facts["cuda_flags"]


@needs_cuda_torch
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_kernels_that_do_not_compile(source: Path, tmp_path: Path, mode: str) -> None:
    package = source / "sparsecnx"
    (source / "csrc/cuda/kernel.cu").write_text("error\n")
    (package / "_C_cuda.abi3.so").write_text("of an earlier install")
    result = build_in_place(source, CUDA_HOME=str(fake_toolkit(tmp_path / "cuda")), SPARSECNX_BUILD=mode)
    assert "kernel.cu(1): error: no such thing" in result.stdout
    if mode == "cuda":  # It is an error, and what was installed before stays.
        assert result.returncode != 0 and libraries(package) == ["_C_cuda.abi3.so"]
        return
    assert result.returncode == 0 and "without its GPU operators" in result.stderr, result.stderr
    assert libraries(package) == ["_C.abi3.so"] and (compiled.build_info(package) or {})["cuda"] is None
    missing = compiled.load_cuda(package)
    assert missing is not None
    assert missing.reason.startswith(f"not compiled: compiling against torch {torch.__version__} failed: ")
    assert "SPARSECNX_BUILD=cuda pip install" in missing.remedy


@needs_cuda_torch
def test_a_toolkit_that_does_not_fit_costs_the_gpu_operators_alone(source: Path, tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", release="10.2")
    result = pip("install", source, "--target", tmp_path / "t", CUDA_HOME=str(toolkit), SPARSECNX_BUILD="cuda")
    assert result.returncode != 0
    assert f"SPARSECNX_BUILD=cuda: {toolkit}/bin/nvcc is of CUDA 10.2, torch" in result.stdout + result.stderr

    result = build_in_place(source, CUDA_HOME=str(toolkit), SPARSECNX_BUILD="auto")
    assert result.returncode == 0 and libraries(source / "sparsecnx") == ["_C.abi3.so"], result.stderr
    missing = compiled.load_cuda(source / "sparsecnx")
    assert missing is not None and "nvcc is of CUDA 10.2" in missing.reason
    assert missing.remedy.startswith(f"Install the CUDA {TORCH_CUDA.partition('.')[0]} toolkit")


@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_a_rebuild_compiles_what_changed_alone(source: Path) -> None:
    """After an editable install a wheel compiles nothing."""
    hooks = "import sys; sys.path.insert(0, 'csrc'); import build_backend; build_backend."
    assert run("-c", f"{hooks}build_editable('wheels')", cwd=source, SPARSECNX_BUILD="cpu").returncode == 0
    (object_file,) = (source / "build").rglob("*.o")
    time, library = object_file.stat().st_mtime_ns, source / "sparsecnx/_C.abi3.so"
    content = library.read_bytes()
    result = run("-c", f"{hooks}build_wheel('wheels')", cwd=source, SPARSECNX_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (built,) = (source / "build").rglob("_C.abi3.so")
    assert object_file.stat().st_mtime_ns == time and built.read_bytes() == content
    (source / "csrc/value.h").write_text("const int value = 2;\n")
    assert build_in_place(source, SPARSECNX_BUILD="cpu").returncode == 0
    assert library.read_bytes() != content


@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_an_upgraded_compiler_compiles_again_in_the_folder_that_was_chosen(source: Path, tmp_path: Path) -> None:
    compiler, chosen = tmp_path / "c++", tmp_path / "chosen"
    (source / "setup.cfg").write_text(f"[build]\nbuild_base = {chosen}\n")
    program, times = "import sys; sys.path.insert(0, 'csrc'); import build_backend as b; b.build_editable('wheels')", []
    for version in (1, 1, 2):
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version}\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        result = run("-c", program, cwd=source, SPARSECNX_BUILD="cpu", CXX=str(compiler))
        assert result.returncode == 0, result.stderr
        (object_file,) = chosen.rglob("*.o")
        times.append(object_file.stat().st_mtime_ns)
    assert times[0] == times[1] < times[2] and not (source / "build").exists()


def test_a_toolkit_behind_a_script_on_the_path(compilers: Any, monkeypatch: Any, tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", release="13.1")
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    torch_13 = torch_of("13.0")
    found = compilers.find_toolkit(torch_13)  # Another minor version than torch's does no harm.
    runtime = f"{toolkit}/lib/libcudart_static.a"
    assert found == {"nvcc": str(script), "version": "13.1", "include": [], "runtime": runtime}
    assert str(tmp_path) == torch_13.utils.cpp_extension.CUDA_HOME


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        ("no library", "lacks libcudart_static.a: looked in .*/cuda/stubs, .*/cuda/lib$", ".*cuda-cudart-dev-13-0"),
        ("architecture", "nvcc 13.0 does not compile: .*Unsupported gpu architecture", "Set TORCH_CUDA_ARCH_LIST"),
        ("compiler", "nvcc 13.0 does not compile: .*unsupported GNU version!", "Set NVCC_CCBIN to a g\\+\\+"),
        ("version", "nvcc is of CUDA 12.8, torch 2.99.0 is built for CUDA 13.0", "Install the CUDA 13 toolkit"),
        ("CPU torch", "torch 2.99.0 is not built for CUDA", "Install a CUDA build of torch"),
        ("no nvcc", "no nvcc: looked in CUDA_HOME=/nowhere, PATH, ", "Install the CUDA 13 toolkit .*set CUDA_HOME"),
    ],
)
def test_reasons_and_remedies(
    compilers: Any, monkeypatch: Any, tmp_path: Path, change: str, reason: str, remedy: str
) -> None:
    release = "12.8" if change == "version" else "13.0"
    toolkit = fake_toolkit(tmp_path / "cuda", release=release, library=change != "no library")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if change == "architecture":
        monkeypatch.setattr(compilers, "ARCHITECTURES", "7.0;9.0")
    if change == "compiler":
        nvcc = toolkit / "bin/nvcc"
        nvcc.write_text(
            nvcc.read_text().replace("if grep", "echo 'host_config.h: error: unsupported GNU version!'; exit 1 #")
        )
    if change == "no nvcc":
        monkeypatch.setitem(compilers.find_nvcc.__globals__, "USUAL_TOOLKIT", tmp_path / "usual")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(compilers.CannotCompile) as error:
        compilers.find_toolkit(torch_of(None if change == "CPU torch" else "13.0"))
    facts = error.value.facts()
    assert re.search(reason, facts["reason"]) and re.match(remedy, facts["remedy"]), facts


def test_architectures(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "ARCHITECTURES", "8.0;9.0a+PTX")
    code = [flag.removeprefix("-gencode=arch=") for flag in compilers.architecture_flags()]
    assert code == ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90a,code=compute_90a"]
    monkeypatch.setattr(compilers, "ARCHITECTURES", "Hopper")
    with pytest.raises(compilers.CannotCompile, match="TORCH_CUDA_ARCH_LIST is 'Hopper': 'Hopper' is no compute"):
        compilers.architecture_flags()


def test_make_builds_what_nvcc_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSECNX_BUILD", raising=False)
    command = ["make", "--dry-run", "clean", f"PYTHON={sys.executable}"]
    for release, mode in (("13.2", "cuda"), ("12.8", "cpu")):
        toolkit = fake_toolkit(tmp_path / release, release=release)
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        said = subprocess.check_output(command, cwd=ROOT, text=True)
        assert f"SPARSECNX_BUILD={mode} ({toolkit}/bin/nvcc)\n" in said


def test_a_source_distribution_has_all_sources_and_installs(source: Path, tmp_path: Path) -> None:
    result = run("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")} - names == set()
    result = pip("install", archive, "--target", tmp_path / "installed", SPARSECNX_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert libraries(tmp_path / "installed/sparsecnx") == ["_C.abi3.so"]


def test_unknown_build_mode(source: Path) -> None:
    result = run("setup.py", "--version", cwd=source, SPARSECNX_BUILD="fast")
    assert result.stderr == "SPARSECNX_BUILD is 'fast': expected auto, cpu, cuda or none\n"


# Runs a hook of the build backend as pip does with build isolation: it sees setuptools and the folder argv[1] alone.
ISOLATED = """
import site, sys
environment, visible = sys.argv[1:]
sys.path = [path for path in sys.path if path not in site.getsitepackages()] + [visible, "csrc"]
site.getsitepackages = lambda: [environment]
import build_backend
print(build_backend.get_requires_for_build_wheel())
"""


@pytest.mark.parametrize("version", [None, "2.4.1", "2.11.0"])
def test_a_torch_that_is_installed_is_never_replaced(source: Path, tmp_path: Path, version: str | None) -> None:
    environment, visible = tmp_path / "environment", tmp_path / "visible"
    packages = Path(setuptools.__file__).parents[1]
    for folder in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        shutil.copytree(folder, visible / folder.name)
    if version is not None:
        metadata = environment / f"torch-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    result = run("-c", ISOLATED, environment, visible, cwd=source, SPARSECNX_BUILD="auto")
    if version == "2.4.1":
        assert "torch 2.4.1 is installed and sparsecnx needs 2.11 or later" in result.stderr
    else:
        assert result.stdout.splitlines()[-1] == str([] if version else ["torch>=2.11"]), result.stderr


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
        # The runtime inside is private: it neither replaces torch's, nor is it replaced.
        offered = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
        assert re.findall(r"\bcuda[A-Z]\w*", offered) == []
        architectures = (compiled.build_info() or {})["cuda_architectures"]
        names = [item.partition("+")[0].replace(".", "") for item in re.split("[; ,]+", architectures)]
        assert all(f"sm_{name}".encode() in library.read_bytes() for name in names)


def test_operators_of_this_version_are_those_of_the_library() -> None:
    text = (ROOT / "csrc/library.cpp").read_text()
    blocks = re.findall(r"^STABLE_TORCH_LIBRARY\((\w+), m\) {(.*?)^}", text, re.MULTILINE | re.DOTALL)
    found = {library: re.findall(r'm\.def\(\s*"(\w+)', body) for library, body in blocks}
    assert found == {"sparsecnx": compiled.OPERATORS, "sparsecnx_cuda": compiled.CUDA_OPERATORS}


@pytest.mark.skipif(not compiled.loaded, reason=f"{compiled.why_not}")
def test_build_info_is_of_this_version() -> None:
    facts = compiled.build_info() or {}
    assert (facts["version"], facts["oldest_torch"]) == (sparsecnx.__version__, compiled.OLDEST_TORCH)
    assert facts["compiler"] and facts["torch"]
    assert "-O3" in facts["flags"] and "-march" not in facts["flags"]


def test_libraries_that_do_not_load_are_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for load, library, again in (
        (compiled.load, "_C.abi3.so", "pip install"),
        (compiled.load_cuda, "_C_cuda.abi3.so", "SPARSECNX_BUILD=cuda pip install"),
    ):
        missing = load(tmp_path)
        assert missing is not None and missing.reason.startswith("not compiled: installed without them")
        (tmp_path / library).write_text("not a library")
        missing = load(tmp_path)
        assert missing is not None and f"{library} does not load into torch" in missing.reason
        assert missing.remedy.startswith(f"{again} --force-reinstall")
        facts = {"libraries": {library: {"size": 12_577_224, "blake2b": ""}}}
        (tmp_path / "_build.json").write_text(json.dumps(facts))
        missing = load(tmp_path)
        assert missing is not None and missing.remedy.startswith(f"{again} --force-reinstall")
        end = "is damaged or was changed after the build: it has 13 bytes, 12,577,224 were built"
        assert missing.reason == f"{library} {end}"
        (tmp_path / "_build.json").unlink()


DAMAGED = """
import os, shutil, sys
from pathlib import Path

package, built = Path(sys.argv[1], "sparsecnx"), Path(sys.argv[2])
library = package / built.name
shutil.copy(built, library)
(package / "_build.json").write_text("{}")
sys.path.append(sys.argv[3])
import library_facts
library_facts.main(package)
os.truncate(library, library.stat().st_size // 2)
import sparsecnx.doctor
print(sparsecnx.doctor._cpu_operators())

# Without a record the library itself says how long it is.
for record in ("{}", '{"libraries": null}', '{"libraries": {"_C.abi3.so": {"size": "2"}}}'):
    (package / "_build.json").write_text(record)
    for size in (library.stat().st_size, 100):
        os.truncate(library, size)
        print(sparsecnx.backends.compiled.load(package).reason)
    shutil.copy(built, library)
    os.truncate(library, library.stat().st_size // 2)
shutil.copy(built, library)
library_facts.main(package)

shutil.copy(built, library)
with open(library, "r+b") as file:
    file.seek(library.stat().st_size // 2)
    byte = file.read(1)
    file.seek(-1, 1)
    file.write(bytes([byte[0] ^ 1]))
print(sparsecnx.backends.compiled.load(package))
shutil.copy(built, library)
print(sparsecnx.backends.compiled.load(package))
"""


@pytest.mark.skipif(not compiled.loaded, reason=f"{compiled.why_not}")
def test_a_damaged_library_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    """Half of one ends the process with SIGBUS."""
    binaries = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "sparsecnx", tmp_path / "sparsecnx", ignore=binaries)
    built = compiled.find("_C")
    assert built is not None
    result = run("-c", DAMAGED, tmp_path, built, ROOT / "csrc", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    size = built.stat().st_size
    half, *unrecorded, whole, repaired = result.stdout.splitlines()
    reason = "_C.abi3.so is damaged or was changed after the build:"
    found = f"{reason} it has {size // 2:,} bytes, {size:,} were built"
    assert half.startswith(
        f"Check(name='CPU operators', ok=False, detail='{found}', remedy='pip install --force-reinstall"
    )
    said = [
        f"{reason} it has {part}, its header says at least {size:,}" for part in (f"{size // 2:,} bytes", "100 bytes")
    ]
    assert unrecorded == 3 * said
    assert whole.startswith(f"Missing(reason='{reason} its content is not what was built', remedy='pip install")
    assert repaired == "None"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dangling", "cannot be read: No such file or directory"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("forbidden", "cannot be read: Permission denied"),
    ],
)
def test_a_library_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str) -> None:
    library = tmp_path / "_C.abi3.so"
    if kind in ("dangling", "loop"):
        library.symlink_to("nowhere" if kind == "dangling" else library)
    elif kind == "folder":
        library.mkdir()
    elif kind == "pipe":
        os.mkfifo(library)
    else:  # Root may read every file.
        library.touch()
        monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
    missing = compiled.load(tmp_path)
    assert missing is not None and missing.reason == f"{library} {reason}"
    assert missing.remedy.startswith("pip install --force-reinstall")


def test_a_malformed_entry_of_the_record_is_no_entry(tmp_path: Path) -> None:
    for text in ('{"libraries": null}', '{"libraries": {"_C.abi3.so": {"size": 1}}, "cpu_failure": {"reason": 1}}'):
        (tmp_path / "_build.json").write_text(text)
        info = compiled.build_info(tmp_path)
        assert info is not None and info["libraries"] == {} and info["cpu_failure"] is info["version"] is None
        missing = compiled.load(tmp_path)
        assert missing is not None and missing.reason == "not compiled: installed without them"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_record_of_the_build_that_cannot_be_read_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "_build.json").write_text(text)
    assert compiled.build_info(tmp_path) is None


def test_torch_that_the_operators_do_not_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.abi3.so").touch()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    assert compiled.load(tmp_path) == compiled.Missing(
        "the compiled operators need torch 2.11 or later, this is 2.9.1", "pip install --upgrade torch"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    missing = compiled.load_cuda(tmp_path)
    assert missing is not None and missing.reason == "this torch is built for CPU only"


def test_version_mismatch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left in a source folder after `git pull` and lack the operators that were added since."""
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (tmp_path / name).touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compiled, "load_library", lambda library, remedy: None)
    monkeypatch.setattr(compiled, "OPERATORS", ["cpu_isa", "of_tomorrow"])
    lacking = "sparsecnx_cuda::depthwise_conv"
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name != lacking)
    cpu, cuda = compiled.load(tmp_path), compiled.load_cuda(tmp_path)
    assert cpu is not None and cuda is not None
    assert cpu.reason.startswith("_C.abi3.so is of another version of sparsecnx: it lacks ")
    assert "sparsecnx::of_tomorrow" in cpu.reason and cpu.remedy.startswith("pip install --force-reinstall")
    assert cuda.reason == f"_C_cuda.abi3.so is of another version of sparsecnx: it lacks {lacking}"
    assert cuda.remedy.startswith("SPARSECNX_BUILD=cuda pip install")
