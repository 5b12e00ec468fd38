"""Builds the compiled part of sparsecnx; everything else about the package is in pyproject.toml.

Two plain shared libraries of torch operators: `sparsecnx._C` from `csrc/library.cpp` and `csrc/cpu/*.cpp`, and, with
nvcc and a CUDA build of torch, `sparsecnx._C_cuda` from `csrc/cuda/*`. They are apart so that GPU operators that do not
load cost nobody the CPU operators. Both use torch's ABI-stable headers alone, so they run on any torch from
OLDEST_TORCH on, whichever they were compiled with. `sparsecnx._build_info` says how they were built.

Environment variables:

    SPARSECNX_BUILD=auto      (default) all that can be; what cannot is left out, and `sparsecnx doctor` says why
    SPARSECNX_BUILD=cpu       the CPU operators, or fail
    SPARSECNX_BUILD=cuda      the CPU and the GPU operators, or fail
    SPARSECNX_BUILD=none      nothing: pure Python
    TORCH_CUDA_ARCH_LIST      the GPUs to compile for, such as "8.0;9.0+PTX"
    CUDA_HOME                 folder of the CUDA toolkit, where nvcc is not on the PATH
    CXX, MAX_JOBS             the C++ compiler, of nvcc too; how many compile at a time
    NVCC_APPEND_FLAGS         nvcc's own: -lineinfo, for profilers
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("SPARSECNX_BUILD", "auto")
OLDEST_TORCH = "2.11"
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# Machine code for compute capability 8.0 runs on every 8.x, for 9.0 on Hopper; later GPUs translate the PTX of 9.0 when
# they first load it. That is every GPU the kernels are made for (8.0 and later), for the price of two compilations.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"

# What an install leaves in the package folder.
CPU_FILES = ("_C.*so", "_build_info.*so")
CUDA_FILES = ("_C_cuda.*so",)
CPU_NOTE = "_build_failure.txt"  # why there is none of it: the reason, and on the next line the remedy
CUDA_NOTE = "_build_failure_cuda.txt"


class CannotCompile(Exception):
    """Why something cannot be compiled here, and on the next line what to do about it."""


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit that GPU operators are compiled with."""

    nvcc: str
    version: str
    include: list[str]
    cudart: str  # the static runtime library: no version of the dynamic one has to be there when the operators run


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


def find_toolkit(torch: Any) -> Toolkit:
    """The CUDA toolkit, checked against torch."""
    if torch.version.cuda is None:
        raise CannotCompile(
            f"torch {torch.__version__} is not built for CUDA\n"
            "Install a CUDA build of torch: https://pytorch.org/get-started/locally"
        )
    (major, _) = release(torch.version.cuda)
    advice = (
        f"Install the CUDA {major} toolkit (https://developer.nvidia.com/cuda-downloads), or set CUDA_HOME to the"
        " folder where it is."
    )
    search = runpy.run_path(str(Path(__file__).parent / "csrc/find_nvcc.py"))
    nvcc = search["find_nvcc"]()
    if nvcc is None:
        raise CannotCompile(f"no nvcc: looked in {search['looked_in']()}\n{advice}")

    told = subprocess.run([nvcc, "--version"], text=True, capture_output=True)
    found = re.search(r"release (\d+\.\d+)", told.stdout)
    if told.returncode != 0 or found is None:
        raise CannotCompile(f"{nvcc} --version says no version: {first_line(told.stderr or told.stdout)}\n{advice}")
    version = found[1]
    if release(version)[0] != major:
        raise CannotCompile(
            f"{nvcc} is of CUDA {version}, torch {torch.__version__} is built for CUDA {torch.version.cuda}\n{advice}"
            f" Or install a torch that is built for CUDA {release(version)[0]}."
        )

    # nvcc itself knows where the toolkit's files are: packagers scatter them, and nvcc on the PATH may be a script that
    # calls another.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], text=True, capture_output=True).stderr
    include, libraries = ([*_folders(plan, "INCLUDES", "-I")], [*_folders(plan, "LIBRARIES", "-L")])
    cudart = next((str(path) for folder in libraries if (path := Path(folder, "libcudart_static.a")).exists()), None)
    if cudart is None:
        raise CannotCompile(
            f"the toolkit of {nvcc} lacks libcudart_static.a: looked in {', '.join(libraries) or 'no folder'}\n"
            f"Install its runtime library (package cuda-cudart-dev-{version.replace('.', '-')};"
            " conda: cuda-cudart-static)."
        )
    return Toolkit(nvcc, version, include, cudart)


def _folders(plan: str, variable: str, flag: str) -> list[str]:
    """Folders named by lines such as `#$ LIBRARIES=  "-L/usr/lib/stubs" "-L/usr/lib"` of nvcc's plan."""
    values = re.findall(rf"^#\$ {variable}=(.*)$", plan, re.MULTILINE)
    words = [word for value in values for word in shlex.split(value)]
    return [os.path.realpath(word.removeprefix(flag)) for word in words if word.startswith(flag)]


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX": machine code for each, and PTX where it says so."""
    flags = []
    for entry in re.split(r"[;,\s]+", architectures.strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if found is None:
            raise CannotCompile(
                f"TORCH_CUDA_ARCH_LIST is {architectures!r}: {entry!r} is no compute capability\n"
                "Write it as numbers, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX', or unset it."
            )
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_kernels(toolkit: Toolkit, sources: list[str], folder: Path) -> list[str]:
    """Compile .cu files, several at a time. Returns the object files.

    They include no torch header. BuildExtension is not asked to do it: it guesses where the toolkit is, and wants
    other names for a .cu and a .cpp file side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ["CXX"])
    flags = [*NVCC_FLAGS, *architecture_flags(ARCHITECTURES)]
    if len(compiler) == 1:  # of a command of several words nvcc finds its own way
        flags.append(f"-ccbin={compiler[0]}")

    def compile_one(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.cuda.o")
        command = [toolkit.nvcc, *flags, "-c", source, "-o", target]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(shlex.join(command), done.stdout, sep="\n", flush=True)
        if done.returncode != 0:
            error = first_line(done.stdout)
            raise CannotCompile(f"nvcc {toolkit.version} on {source}: {error}\n{advice_on(error)}".strip())
        return target

    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with concurrent.futures.ThreadPoolExecutor(max_workers=jobs) as pool:
        tasks = [pool.submit(compile_one, source) for source in sources]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def first_line(output: str) -> str:
    """The first line of a compiler's output that tells of an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search("error|fatal", line)), lines[-1] if lines else "it said nothing")


def advice_on(error: str) -> str:
    """What to do about an error of nvcc; nothing where it is not known."""
    if re.search("unsupported .*(version|compiler)!", error):
        return "Set CXX to a g++ that this nvcc takes."
    if "Unsupported gpu architecture" in error:
        return f"Set or shorten TORCH_CUDA_ARCH_LIST, now '{ARCHITECTURES}', to what this nvcc compiles for."
    return ""


def macros(facts: dict[str, str]) -> list[tuple[str, str]]:
    """Facts as csrc/build_info.cpp reads them."""
    return [(f"SPARSECNX_{name}", f'"{value}"') for name, value in facts.items()]


def extensions(torch: Any, toolkit: Toolkit | None) -> list[Any]:
    """The operators of the GPU and of the CPU, and the facts about how they were built.

    In this order: nvcc is what fails most easily, and the facts depend on whether it did.
    """
    from torch.utils.cpp_extension import CppExtension

    # Paths of source files end up in error messages: the same ones wherever the build happens.
    roots = [Path.cwd(), Path(torch.__file__).parents[1]]

    def operators(name: str, sources: list[str], include: list[str], **arguments: Any) -> Any:
        return CppExtension(
            name,
            sources,
            include_dirs=[str(Path.cwd() / "csrc"), *include],
            define_macros=[("TORCH_TARGET_VERSION", "0x{:02x}{:02x}{:012x}".format(*release(OLDEST_TORCH), 0))],
            extra_compile_args=[*FLAGS, *(f"-fmacro-prefix-map={root}/=" for root in roots)],
            py_limited_api=True,  # the file is _C.abi3.so, and libtorch_python stays out
            **arguments,
        )

    on_gpu = []
    if toolkit is not None:
        # libtorch_cuda by name, so that a CPU build of torch says what it lacks. The static runtime stays hidden: else
        # the functions of the dynamic one that torch has loaded would take its place.
        torch_cuda = ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]
        runtime = [toolkit.cudart, "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        on_gpu = [
            operators(
                "sparsecnx._C_cuda",
                sorted(glob.glob("csrc/cuda/*.cpp")),
                toolkit.include,
                extra_link_args=[*torch_cuda, *runtime, "-Wl,-z,defs"],
            )
        ]
    on_cpu = operators("sparsecnx._C", ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))], [])
    facts = {"TORCH": torch.__version__, "OLDEST_TORCH": OLDEST_TORCH, "FLAGS": " ".join(FLAGS)}
    build_info = CppExtension(
        "sparsecnx._build_info",
        ["csrc/build_info.cpp"],
        define_macros=macros(facts),
        extra_compile_args=FLAGS,
    )
    return [*on_gpu, on_cpu, build_info]


def destination(command: Command) -> Path:
    """The package folder that a build command writes to."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return Path("sparsecnx") if in_place else Path(command.build_lib, "sparsecnx")


def remove(package: Path, patterns: tuple[str, ...]) -> None:
    """Remove files of this or an earlier install."""
    for pattern in patterns:
        for leftover in package.glob(pattern):
            leftover.unlink()


def leave_pure(package: Path, failure: str | None) -> None:
    """Remove whatever was compiled, now or earlier, and record why nothing is."""
    remove(package, (*CPU_FILES, *CUDA_FILES, CPU_NOTE, CUDA_NOTE))
    if failure is not None:
        note(package / CPU_NOTE, failure)
        say(f"sparsecnx is installed WITHOUT its compiled operators and will be slow.\n{failure}")


def leave_without_cuda(package: Path, failure: str | None) -> None:
    """The same of the GPU operators alone."""
    remove(package, (*CUDA_FILES, CUDA_NOTE))
    if failure is not None:
        note(package / CUDA_NOTE, failure)


def note(file: Path, failure: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(failure + "\n")


def say(text: str) -> None:
    """Tell the person who installs. pip shows nothing of a build that succeeds, hence the terminal itself."""
    text = "\n".join(f"  *** {line}" for line in text.splitlines())
    print(text, file=sys.stderr)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{text}", file=terminal)


def without_compiling(failure: str | None) -> dict[str, Any]:
    """Arguments of `setup` for a pure Python package."""

    def insist() -> None:
        if failure is not None and MODE in ("cpu", "cuda"):
            sys.exit(f"SPARSECNX_BUILD={MODE}: {failure}")

    class BuildPython(build_py):
        def run(self) -> None:
            insist()
            super().run()
            leave_pure(destination(self), failure)

    class BuildNothing(build_ext):
        def run(self) -> None:
            insist()

    return {"cmdclass": {"build_py": BuildPython, "build_ext": BuildNothing}}


def with_compiling(torch: Any, toolkit: Toolkit | None, no_toolkit: str | None) -> dict[str, Any]:
    """Arguments of `setup` for a package with compiled operators."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperators(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Always link: setuptools compares times of the .cpp files alone, not of headers, kernels, flags and facts.
            # What needs no compiling ninja knows better.
            self.force = True

        def run(self) -> None:
            self.without_cuda = no_toolkit
            self.record({"VERSION": self.distribution.get_version()})
            package = destination(self)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if MODE in ("cpu", "cuda"):
                    raise
                self.extensions = []  # nothing of them is to be installed
                remedy = "Install with SPARSECNX_BUILD=cpu to see the compiler's messages, and report them."
                leave_pure(package, f"{self.failed(error)}\n{remedy}")
                return
            remove(package, (CPU_NOTE, CUDA_NOTE))
            if "sparsecnx._C_cuda" not in self.ext_map or self.without_cuda is not None:
                leave_without_cuda(package, self.without_cuda)
            if self.without_cuda is not None and torch.version.cuda is not None:
                say(f"sparsecnx is installed without its GPU operators in CUDA C++.\n{self.without_cuda}")

        def build_extension(self, extension: Any) -> None:
            if extension.name != "sparsecnx._C_cuda":
                super().build_extension(extension)
                return
            try:
                kernels = sorted(glob.glob("csrc/cuda/*.cu"))
                extension.extra_objects = compile_kernels(toolkit, kernels, Path(self.build_temp, "csrc/cuda"))
                super().build_extension(extension)
            except (Exception, SystemExit) as error:
                if MODE == "cuda" and isinstance(error, CannotCompile):
                    sys.exit(f"SPARSECNX_BUILD=cuda: {error}")
                if MODE == "cuda":
                    raise
                self.extensions = [other for other in self.extensions if other is not extension]
                reason, _, remedy = str(error).partition("\n") if isinstance(error, CannotCompile) else (error, "", "")
                remedy = remedy or "Install with SPARSECNX_BUILD=cuda to see the compiler's messages."
                self.without_cuda = f"{self.failed(reason)}\n{remedy}"
            else:
                flags = " ".join(NVCC_FLAGS)
                facts = {"CUDA": toolkit.version, "CUDA_ARCHITECTURES": ARCHITECTURES, "CUDA_FLAGS": flags}
                self.record(facts)

        def record(self, facts: dict[str, str]) -> None:
            self.ext_map["sparsecnx._build_info"].define_macros += macros(facts)

        def failed(self, error: BaseException | str) -> str:
            return f"compiling against torch {torch.__version__} failed: {' '.join(str(error).split())}"

    return {"ext_modules": extensions(torch, toolkit), "cmdclass": {"build_ext": BuildOperators}}


def arguments() -> dict[str, Any]:
    """What `setup` is called with."""
    if MODE not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"SPARSECNX_BUILD is {MODE!r}: expected auto, cpu, cuda or none")
    refuse_old_torch()
    if MODE == "none":
        return without_compiling(None)
    try:
        os.environ["CXX"] = find_compiler()
        torch = import_torch()
        toolkit, no_toolkit = None, None
        if torch is not None and MODE != "cpu":
            try:
                toolkit = find_toolkit(torch)
                architecture_flags(ARCHITECTURES)
            except CannotCompile as error:
                if MODE == "cuda":
                    raise
                toolkit, no_toolkit = None, str(error)
    except CannotCompile as error:
        return without_compiling(str(error))
    if torch is not None:
        return with_compiling(torch, toolkit, no_toolkit)
    # With build isolation pip fetches setup_requires into the isolated environment and calls again.
    failure = "no torch to compile with\nInstall torch first, or install without --no-build-isolation."
    return {**without_compiling(failure), "setup_requires": [f"torch>={OLDEST_TORCH}"]}


setup(**arguments())
