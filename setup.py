"""Builds the compiled part of sparsecnx; everything else about the package is in pyproject.toml.

`sparsecnx._C` is a plain shared library of torch operators: `csrc/library.cpp`, `csrc/cpu/*.cpp` and, with
nvcc and a CUDA build of torch, `csrc/cuda/*.cu`. It uses torch's ABI-stable headers alone, so it runs on any
torch from OLDEST_TORCH on, whichever it was compiled with. `sparsecnx._build_info` says how it was built.

The environment variable SPARSECNX_BUILD decides what is compiled:

    auto   (default) all that can be; where nothing can, install as pure Python and say why
    cpu    the CPU operators, or fail
    none   nothing: pure Python
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.build_py import build_py

MODE = os.environ.get("SPARSECNX_BUILD", "auto")
OLDEST_TORCH = "2.11"
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]


class CannotCompile(Exception):
    """Why nothing can be compiled here, and on the next line what to do about it."""


def site_folders() -> list[str]:
    """Where this interpreter's packages lie, also when pip's build isolation hides them."""
    in_venv = sys.prefix != sys.base_prefix
    return site.getsitepackages() + ([] if in_venv else [site.getusersitepackages()])


def release(version: str) -> tuple[int, ...]:
    """(major, minor)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def refuse_old_torch() -> None:
    """Stop where the dependency on torch would make pip replace the one that is installed."""
    for torch in importlib.metadata.distributions(name="torch", path=site_folders()):
        if release(torch.version) < release(OLDEST_TORCH):
            sys.exit(
                f"torch {torch.version} is installed and sparsecnx needs {OLDEST_TORCH} or later. It is not"
                " replaced behind your back: run `pip install --upgrade torch`, then install sparsecnx again."
            )


def find_compiler() -> str:
    """Command of a C++20 compiler that finds Python's headers."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    advice = "Install g++ 10 or later (Debian, Ubuntu: apt-get install g++), or set CXX to a compiler."
    if compiler is None:
        raise CannotCompile(f"no C++ compiler: found none of {', '.join(names)}\n{advice}")

    include = sysconfig.get_path("include")
    trial = subprocess.run(
        [*shlex.split(compiler), "-std=c++20", f"-I{include}", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <concepts>\n#include <Python.h>\n",
        text=True,
        capture_output=True,
    )
    if trial.returncode == 0:
        return compiler
    if "Python.h" in trial.stderr:
        raise CannotCompile(f"no Python.h in {include}\nInstall it (Debian, Ubuntu: apt-get install python3-dev).")
    error = next((line for line in trial.stderr.splitlines() if "error" in line), f"exit code {trial.returncode}")
    raise CannotCompile(f"{compiler} does not compile C++20: {error.strip()}\n{advice}")


def import_torch() -> Any:
    """The torch to compile with: the one already installed, also when pip hides it; None if there is none."""
    visible = sys.path.copy()
    sys.path += [folder for folder in site_folders() if Path(folder, "torch", "__init__.py").exists()]
    try:
        import torch
        import torch.utils.cpp_extension
    except (ImportError, OSError) as error:
        if getattr(error, "name", None) == "torch":
            return None
        raise CannotCompile(f"torch does not import: {error}\nReinstall torch.") from error
    finally:
        sys.path[:] = visible  # what else is installed there, such as setuptools plugins, stays hidden
    return torch


def extensions(torch: Any) -> list[Any]:
    """The operators, and the facts about how they were built."""
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    facts = {"TORCH": torch.__version__, "OLDEST_TORCH": OLDEST_TORCH, "FLAGS": " ".join(FLAGS)}
    cuda_sources = []
    if MODE == "auto" and CUDA_HOME and torch.version.cuda:
        cuda_sources = sorted(glob.glob("csrc/cuda/*.cu"))
    if cuda_sources:
        facts["CUDA"] = torch.version.cuda
        facts["CUDA_ARCHITECTURES"] = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

    # Paths of source files end up in error messages: the same ones wherever the build happens.
    roots = [Path.cwd(), Path(torch.__file__).parents[1]]
    operators = (CUDAExtension if cuda_sources else CppExtension)(
        "sparsecnx._C",
        ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp")), *cuda_sources],
        include_dirs=[str(Path.cwd() / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x{:02x}{:02x}{:012x}".format(*release(OLDEST_TORCH), 0))],
        extra_compile_args={
            "cxx": [*FLAGS, *(f"-fmacro-prefix-map={root}/=" for root in roots)],
            "nvcc": ["-std=c++20", "-O3"],
        },
        py_limited_api=True,  # the file is _C.abi3.so, and libtorch_python stays out
    )
    build_info = CppExtension(
        "sparsecnx._build_info",
        ["csrc/build_info.cpp"],
        define_macros=[(f"SPARSECNX_{name}", f'"{value}"') for name, value in facts.items()],
        extra_compile_args=FLAGS,
    )
    return [operators, build_info]


def destination(command: Command) -> Path:
    """The package folder that a build command writes to."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return Path("sparsecnx") if in_place else Path(command.build_lib, "sparsecnx")


def leave_pure(package: Path, failure: str | None) -> None:
    """Remove whatever was compiled, now or earlier, and record why nothing is."""
    for leftover in [
        *package.glob("_C.*so"),
        *package.glob("_build_info.*so"),
        package / "_build_failure.txt",
    ]:
        leftover.unlink(missing_ok=True)
    if failure is not None:
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_failure.txt").write_text(failure + "\n")
        say(f"sparsecnx is installed WITHOUT its compiled operators and will be slow.\n{failure}")


def say(text: str) -> None:
    """Tell the person who installs. pip shows nothing of a build that succeeds, hence the terminal itself."""
    text = "\n".join(f"  *** {line}" for line in text.splitlines())
    print(text, file=sys.stderr)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{text}", file=terminal)


def without_compiling(failure: str | None) -> dict[str, Any]:
    """Arguments of `setup` for a pure Python package."""

    class BuildPython(build_py):
        def run(self) -> None:
            if failure is not None and MODE == "cpu":
                sys.exit(f"SPARSECNX_BUILD=cpu: {failure}")
            super().run()
            leave_pure(destination(self), failure)

    return {"cmdclass": {"build_py": BuildPython}}


def with_compiling(torch: Any) -> dict[str, Any]:
    """Arguments of `setup` for a package with compiled operators."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperators(BuildExtension):
        def run(self) -> None:
            version = ("SPARSECNX_VERSION", f'"{self.distribution.get_version()}"')
            self.ext_map["sparsecnx._build_info"].define_macros.append(version)
            package = destination(self)
            try:
                super().run()
                (package / "_build_failure.txt").unlink(missing_ok=True)
            except (Exception, SystemExit) as error:
                if MODE == "cpu":
                    raise
                self.extensions = []  # nothing of them is to be installed
                reason = " ".join(str(error).split())
                failure = f"compiling against torch {torch.__version__} failed: {reason}"
                remedy = "Install with SPARSECNX_BUILD=cpu to see the compiler's messages, and report them."
                leave_pure(package, f"{failure}\n{remedy}")

    return {"ext_modules": extensions(torch), "cmdclass": {"build_ext": BuildOperators}}


def arguments() -> dict[str, Any]:
    """What `setup` is called with."""
    if MODE not in ("auto", "cpu", "none"):
        sys.exit(f"SPARSECNX_BUILD is {MODE!r}: expected auto, cpu or none")
    refuse_old_torch()
    if MODE == "none":
        return without_compiling(None)
    try:
        os.environ["CXX"] = find_compiler()
        torch = import_torch()
    except CannotCompile as error:
        return without_compiling(str(error))
    if torch is not None:
        return with_compiling(torch)
    # With build isolation pip fetches setup_requires into the isolated environment and calls again.
    failure = "no torch to compile with\nInstall torch first, or install without --no-build-isolation."
    return {**without_compiling(failure), "setup_requires": [f"torch>={OLDEST_TORCH}"]}


setup(**arguments())
