"""Builds the compiled part of sparsecnx. Everything else about the package is in pyproject.toml.

The compiled part is two shared libraries of torch operators. `sparsecnx._C` comes from `csrc/library.cpp` and
`csrc/cpu/*.cpp`. `sparsecnx._C_cuda` comes from `csrc/cuda/*` and needs nvcc and a CUDA build of torch. They are
separate, so that GPU operators that do not load never disable the CPU operators. Both use torch's ABI-stable headers
alone and nothing of Python, so one wheel serves every Python and every torch from OLDEST_TORCH on.
`sparsecnx/_build.json` records how they were built, or why not; `sparsecnx doctor` reads it.

docs/install.md lists the environment variables that a build obeys.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_backend import OLDEST_TORCH, installed_packages, torch_version
from compilers import (
    ARCHITECTURES,
    CannotCompile,
    architecture_flags,
    find_compiler,
    find_toolkit,
    nvcc_flags,
    release,
    versions,
)
from library_facts import library_facts

MODE = os.environ.get("SPARSECNX_BUILD", "auto")
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
SLOW = "WITHOUT its compiled operators and will be slow"


def refuse_old_torch() -> None:
    """Stop before pip replaces a torch that is too old: the dependency in pyproject.toml would make it do so."""
    installed = torch_version()
    if installed is not None and release(installed) < release(OLDEST_TORCH):
        sys.exit(
            f"torch {installed} is installed and sparsecnx needs {OLDEST_TORCH} or later. It is not replaced behind"
            " your back: run `pip install --upgrade torch`, then install sparsecnx again."
        )


def import_torch() -> Any:
    """Return the torch to compile with: the installed one, even where build isolation hides it."""
    visible = sys.path.copy()
    sys.path += [folder for folder in installed_packages() if Path(folder, "torch", "__init__.py").exists()]
    try:
        import torch
        import torch.utils.cpp_extension
    except (ImportError, OSError) as error:
        if getattr(error, "name", None) == "torch":
            advice = "Install torch first, or install without --no-build-isolation."
            raise CannotCompile(f"no torch to compile with\n{advice}") from error
        raise CannotCompile(f"torch does not import: {error}\nReinstall torch.") from error
    finally:
        sys.path[:] = visible  # Everything else that is installed there stays hidden.
    return torch


def extensions(torch: Any, toolkit: dict[str, Any] | None) -> list[Any]:
    """Return what to compile: the CPU operators and, with a toolkit, before them the GPU operators."""
    # Error messages contain the paths of source files. They are the same wherever the build happens.
    roots = [Path.cwd(), Path(torch.__file__).parents[1]]

    def operators(name: str, sources: list[str], include: list[str], link: list[str], *others: str) -> Any:
        return torch.utils.cpp_extension.CppExtension(
            name,
            sorted(source for pattern in sources for source in glob.glob(pattern)),
            include_dirs=[str(Path.cwd() / "csrc"), *include],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}{:012x}".format(*release(OLDEST_TORCH), 0)),
                # ninja looks at commands, not at torch's headers, nor at what the name of a compiler stands for.
                ("COMPILED_WITH_TORCH", str(torch.__version__)),
                ("COMPILED_BY", versions(os.environ["CXX"], *others)),
            ],
            extra_compile_args={
                "cxx": [*FLAGS, *(f"-fmacro-prefix-map={root}/=" for root in roots)],
                "nvcc": [*nvcc_flags(), *(architecture_flags() if toolkit else [])],
            },
            extra_link_args=link,
            py_limited_api=True,  # The file is _C.abi3.so, and libtorch_python is not linked.
        )

    on_cpu = operators("sparsecnx._C", ["csrc/library.cpp", "csrc/cpu/*.cpp"], [], [])
    if toolkit is None:
        return [on_cpu]
    # libtorch_cuda is linked by name, so that a CPU build of torch says that it lacks it. The symbols of the static
    # runtime are hidden: otherwise those of the dynamic runtime that torch has loaded would replace them.
    torch_cuda = ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]
    runtime = [toolkit["runtime"], "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    sources = ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
    others = toolkit["nvcc"], os.environ.get("NVCC_CCBIN", "")
    return [operators("sparsecnx._C_cuda", sources, toolkit["include"], [*torch_cuda, *runtime], *others), on_cpu]


def record(command: Command, facts: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
    """Write _build.json into the package folder that a build command fills, and remove libraries of earlier builds."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    package = Path("sparsecnx") if in_place else Path(command.build_lib, "sparsecnx")
    for library in ("_C", "_C_cuda"):
        for leftover in package.glob(f"{library}.*so") if library not in keep else ():
            leftover.unlink()
    (package / "_build.json").unlink(missing_ok=True)
    if facts:
        package.mkdir(parents=True, exist_ok=True)
        facts = {"version": command.distribution.get_version(), **facts, "libraries": library_facts(package)}
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


def announce(missing: str, failure: dict[str, str]) -> None:
    """Tell the person who installs. pip hides the output of a build that succeeds, so write to the terminal itself."""
    lines = [f"sparsecnx is installed {missing}.", failure["reason"], failure["remedy"]]
    text = "\n".join(f"  *** {line}" for line in lines)
    print(text, file=sys.stderr)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{text}", file=terminal)


def pure_commands(failure: CannotCompile | None) -> dict[str, type[Command]]:
    """Return the commands that build a pure Python package."""

    def finish(command: Command) -> None:
        if failure is not None and MODE in ("cpu", "cuda"):
            sys.exit(f"SPARSECNX_BUILD={MODE}: {failure}")
        record(command, {} if failure is None else {"cpu_failure": failure.facts()})
        if failure is not None:
            announce(SLOW, failure.facts())

    def then_finish(base: type[Command]) -> type[Command]:
        class Build(base):  # type: ignore
            def run(self) -> None:
                super().run()
                finish(self)

        return Build

    return {"build_py": then_finish(build_py), "build_ext": then_finish(build_ext)}


def compiling_commands(torch: Any, toolkit: dict[str, Any] | None, no_toolkit: CannotCompile | None) -> dict[str, Any]:
    """Return the commands that build a package with compiled operators."""

    class BuildOperators(torch.utils.cpp_extension.BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            self.force = True  # Always link. setuptools does not see changes of headers and flags; ninja does.
            chosen = self.distribution.get_option_dict
            if self.editable_mode and "build_temp" not in chosen("build_ext"):
                # A later install or wheel finds the objects, which setuptools would throw away.
                build = self.distribution.get_command_class("build")(self.distribution)
                for name in {"build_base", "build_temp"} & chosen("build").keys():
                    setattr(build, name, chosen("build")[name][1])
                build.finalize_options()
                self.build_temp = build.build_temp
            failures = {"cuda_failure": no_toolkit.facts() if no_toolkit else None, "cpu_failure": None}
            options = self.compiler, self.inplace
            while self.extensions:
                try:
                    super().run()
                    break
                except (Exception, SystemExit) as error:
                    if MODE != "auto":
                        raise
                    failed = "cuda" if len(self.extensions) == 2 else "cpu"
                    remedy = f"Install with SPARSECNX_BUILD={failed} to see the compiler's messages."
                    message = " ".join(str(error).split())
                    failure = CannotCompile(f"compiling against torch {torch.__version__} failed: {message}\n{remedy}")
                    failures[f"{failed}_failure"] = failure.facts()
                    self.compiler, self.inplace = options  # A run that fails leaves them changed.
                    del self.extensions[0]
            built = tuple(extension.name.rpartition(".")[2] for extension in self.extensions)
            record(self, {**facts(cuda="_C_cuda" in built), **failures}, keep=built)
            if failures["cpu_failure"]:
                announce(SLOW, failures["cpu_failure"])
            elif failures["cuda_failure"] and torch.version.cuda is not None:
                announce("without its GPU operators in CUDA C++", failures["cuda_failure"])

    def facts(cuda: bool) -> dict[str, Any]:
        command = [*shlex.split(os.environ["CXX"]), "--version"]
        return {
            "compiler": subprocess.check_output(command, text=True).partition("\n")[0],
            "flags": " ".join(FLAGS),
            "torch": str(torch.__version__),
            "oldest_torch": OLDEST_TORCH,
            "cuda": toolkit["version"] if toolkit and cuda else None,
            "cuda_architectures": ARCHITECTURES if cuda else None,
            "cuda_flags": " ".join(nvcc_flags()) if cuda else None,
        }

    return {"build_ext": BuildOperators}


def main() -> None:
    if MODE not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"SPARSECNX_BUILD is {MODE!r}: expected auto, cpu, cuda or none")
    if sys.version_info < (3, 10):  # noqa: UP036 - pip would look for a torch first, and report that it finds none
        sys.exit(f"sparsecnx needs Python 3.10 or later: this is {sys.version.split()[0]}")
    refuse_old_torch()
    toolkit, no_toolkit = None, None
    try:
        if MODE == "none":
            return setup(cmdclass=pure_commands(None))
        os.environ["CXX"] = find_compiler()
        torch = import_torch()
        try:
            toolkit = find_toolkit(torch) if MODE != "cpu" else None
        except CannotCompile as error:
            if MODE == "cuda":
                raise
            no_toolkit = error
    except CannotCompile as error:
        return setup(cmdclass=pure_commands(error))
    setup(
        ext_modules=extensions(torch, toolkit),
        cmdclass=compiling_commands(torch, toolkit, no_toolkit),
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
