"""The search for the compilers that setup.py needs: a C++ compiler and the CUDA toolkit, both tried out.

As a program it prints the path of nvcc, or fails and says where it looked. It runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Machine code for compute capability 8.0 runs on every 8.x, that for 9.0 on Hopper. Later GPUs translate the PTX of 9.0
# when they first load it. So two compilations serve every GPU that the kernels are made for.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"

USUAL_TOOLKIT = Path("/usr/local/cuda")


def nvcc_flags() -> list[str]:
    """Return nvcc's flags but for the architectures. NVCC_CCBIN, or else CXX, is its host compiler."""
    host = os.environ.get("NVCC_CCBIN") or os.environ.get("CXX", "c++")
    return [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fvisibility=hidden",
        "-Xptxas=-warn-spills",
        f"-ccbin={host}",
    ]


class CannotCompile(Exception):
    """Says why something cannot be compiled here (first line) and what to do about it (second line)."""

    def facts(self) -> dict[str, str]:
        """Return the two lines as sparsecnx/_build.json stores them."""
        reason, _, remedy = str(self).partition("\n")
        return {"reason": reason, "remedy": remedy}


def release(version: str) -> tuple[int, ...]:
    """Return (major, minor)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that reports an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("#$")]
    return next((line for line in lines if re.search("error|fatal", line)), lines[-1] if lines else "no message")


def find_compiler() -> str:
    """Return the command of a C++20 compiler that finds Python's headers, which torch's own headers include."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    if asked and shutil.which(asked) is None and len(shlex.split(asked)) > 1:
        raise CannotCompile(f"CXX is {asked!r}: torch runs it as one program\nSet CXX to a script that calls it.")
    compiler = next((name for name in names if shutil.which(name)), None)
    advice = "Install g++ 10 or later (Debian, Ubuntu: apt-get install g++), or set CXX to a compiler."
    if compiler is None:
        raise CannotCompile(f"no C++ compiler: found none of {', '.join(names)}\n{advice}")

    include = sysconfig.get_path("include")
    trial = subprocess.run(
        [compiler, "-std=c++20", f"-I{include}", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <concepts>\n#include <Python.h>\n",
        text=True,
        capture_output=True,
    )
    if trial.returncode == 0:
        return compiler
    if "Python.h" in trial.stderr:
        raise CannotCompile(f"no Python.h in {include}\nInstall it (Debian, Ubuntu: apt-get install python3-dev).")
    raise CannotCompile(f"{compiler} does not compile C++20: {first_error(trial.stderr)}\n{advice}")


def versions(*compilers: str) -> str:
    """Return a number that changes when one of these compilers is upgraded under the same name."""
    commands = [[name, "--version"] for name in compilers if shutil.which(name)]
    said = [subprocess.run(command, text=True, capture_output=True).stdout for command in commands]
    return f"{zlib.crc32(''.join(said).encode()):08x}"


def toolkit_homes() -> dict[str, str]:
    """Return the environment variables that name the folder of a CUDA toolkit."""
    return {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}


def find_nvcc() -> str | None:
    """Return the path of nvcc. An environment variable that names a folder without it is passed over."""
    homes = [Path(home, "bin/nvcc") for home in toolkit_homes().values()]
    candidates = [*homes, shutil.which("nvcc") or "", USUAL_TOOLKIT / "bin/nvcc"]
    return next((str(file) for file in candidates if os.access(file, os.X_OK)), None)


def no_nvcc() -> str:
    """Return the message that there is no nvcc."""
    homes = [f"{name}={home}" for name, home in toolkit_homes().items()]
    return f"no nvcc: looked in {', '.join([*homes, 'PATH', str(USUAL_TOOLKIT)])}"


def architecture_flags() -> list[str]:
    """Return nvcc's flags for a list such as "8.0;9.0+PTX": machine code for each, and PTX where it says so."""
    flags = []
    for entry in re.split(r"[;,\s]+", ARCHITECTURES.strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if found is None:
            raise CannotCompile(
                f"TORCH_CUDA_ARCH_LIST is {ARCHITECTURES!r}: {entry!r} is no compute capability\n"
                "Write it as numbers, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX', or unset it."
            )
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_toolkit(torch: Any) -> dict[str, Any]:
    """Return the version, include folders and static runtime library of the CUDA toolkit, after a trial compilation."""
    if torch.version.cuda is None:
        raise CannotCompile(
            f"torch {torch.__version__} is not built for CUDA\n"
            "Install a CUDA build of torch: https://pytorch.org/get-started/locally"
        )
    (major, _) = release(torch.version.cuda)
    url = "https://developer.nvidia.com/cuda-downloads"
    advice = f"Install the CUDA {major} toolkit ({url}), or set CUDA_HOME to the folder where it is."
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotCompile(f"{no_nvcc()}\n{advice}")
    answer = subprocess.run([nvcc, "--version"], text=True, capture_output=True)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    if found is None:
        error = first_error(answer.stderr or answer.stdout)
        raise CannotCompile(f"{nvcc} --version does not report a version: {error}\n{advice}")
    if release(found[1])[0] != major:
        raise CannotCompile(
            f"{nvcc} is of CUDA {found[1]}, torch {torch.__version__} is built for CUDA {torch.version.cuda}\n"
            f"{advice} Or install a torch that is built for CUDA {release(found[1])[0]}."
        )

    # nvcc reports where the toolkit's files are. Packagers scatter them, and nvcc on the PATH may be a script.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.touch()
        command = [
            nvcc,
            "--verbose",
            *nvcc_flags(),
            *architecture_flags(),
            "-c",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        trial = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if trial.returncode != 0:
        error = first_error(trial.stdout)
        remedy = "Repair the CUDA toolkit, or install with SPARSECNX_BUILD=cpu."
        if re.search("unsupported .*(version|compiler)!", error):
            remedy = "Set NVCC_CCBIN to a g++ that this nvcc takes."
        if "Unsupported gpu architecture" in error:
            remedy = f"Set TORCH_CUDA_ARCH_LIST, now '{ARCHITECTURES}', to what this nvcc compiles for."
        raise CannotCompile(f"nvcc {found[1]} does not compile: {error}\n{remedy}")
    libraries = folders(trial.stdout, "LIBRARIES")
    archives = [Path(library, "libcudart_static.a") for library in libraries]
    runtime = next((str(archive) for archive in archives if archive.exists()), None)
    if runtime is None:
        package = f"cuda-cudart-dev-{found[1].replace('.', '-')}; conda: cuda-cudart-static"
        raise CannotCompile(
            f"the toolkit of {nvcc} lacks libcudart_static.a: looked in {', '.join(libraries) or 'no folder'}\n"
            f"Install its runtime library (package {package})."
        )
    torch.utils.cpp_extension.CUDA_HOME = str(Path(nvcc).parents[1])  # torch has searched differently.
    include = folders(trial.stdout, "INCLUDES")
    return {"nvcc": nvcc, "version": found[1], "include": include, "runtime": runtime}


def folders(plan: str, variable: str) -> list[str]:
    """Return the folders in lines of nvcc's plan such as `#$ LIBRARIES=  "-L/usr/lib/stubs" "-L/usr/lib"`."""
    values = re.findall(rf"^#\$ {variable}=(.*)$", plan, re.MULTILINE)
    return [os.path.realpath(word[2:]) for word in shlex.split(" ".join(values))]


if __name__ == "__main__":
    print(find_nvcc() or sys.exit(no_nvcc()))
