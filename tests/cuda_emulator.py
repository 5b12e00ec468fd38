"""Runs CUDA kernels without a GPU.

csrc/cuda is compiled with g++ against tests/emulator/include, where the threads of a block are fibers on the CPU. The
library gives the operators `sparsecnx_cuda::*` an implementation for CPU tensors.

    python tests/cuda_emulator.py    build it
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "emulator"
KERNELS = ROOT / "csrc" / "cuda"
BUILT = ROOT / "build" / "emulator"
TORCH = Path(torch.__file__).parent

INCLUDE = [HERE / "include", KERNELS, TORCH / "include"]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
]
FLAGS += ["-U_FORTIFY_SOURCE"]  # It takes a change of stacks for an error.
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DSPARSECNX_DISPATCH_KEY=CPU"]
# Undefined behaviour of kernels, such as misaligned accesses, traps. The emulator turns it into an error.
TRAPS = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"]
LINK = ["-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic"]


class DoesNotCompile(Exception):
    """Contains the messages of the compiler."""


def compiler() -> str | None:
    return shutil.which("g++")


def refusal() -> str | None:
    """Return why there is no emulator here; None if there is one."""
    from sparsecnx.backends import compiled

    if compiler() is None:
        return "the emulator of CUDA kernels needs g++"
    if not compiled.loaded:
        return (
            f"the emulator of CUDA kernels needs the compiled operators, which define the schemas: {compiled.why_not}"
        )
    return None


def run(command: list[str]) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise DoesNotCompile(f"{' '.join(command)}\n{outcome.stderr}")
    if outcome.stderr:
        print(outcome.stderr, file=sys.stderr)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


@cache
def headers() -> bytes:
    """Return all that a compilation depends on apart from its source and flags."""
    assert compiler() is not None
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, check=True).stdout
    files = sorted(path for folder in (HERE / "include", KERNELS, KERNELS.parent) for path in folder.glob("*.*h"))
    return b"\0".join([version, torch.__version__.encode(), *(path.read_bytes() for path in files)])


def compile_one(source: Path) -> Path:
    """Return the object file of a source. Compile it unless that was done before."""
    flags = [*FLAGS, *(TRAPS if source.suffix == ".cu" else [])]
    key = digest(headers(), source.name.encode(), source.read_bytes(), " ".join(flags).encode())
    built = BUILT / f"{source.stem}-{key}.o"
    if not built.exists():
        unfinished = built.with_suffix(f".{os.getpid()}.o")
        include = [f"-I{folder}" for folder in INCLUDE]
        run([str(compiler()), *flags, *include, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
        unfinished.replace(built)
    return built


def build(sources: list[Path], link: list[str]) -> Path:
    """Return a shared library of these sources and the emulator. One process builds it, others wait for it."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(sources, link)


def _build(sources: list[Path], link: list[str]) -> Path:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, [HERE / "emulator.cpp", *sources]))
    library = BUILT / f"{digest(*(path.name.encode() for path in objects), ' '.join(link).encode())}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        run([str(compiler()), *LINK, *map(str, objects), "-o", str(unfinished), *link])
        unfinished.replace(library)
    return library


def build_operators() -> Path:
    """Return the library of the operators in csrc/cuda."""
    sources = [
        path for path in sorted(KERNELS.iterdir()) if path.suffix in (".cu", ".cpp") and path.name != "stream.cpp"
    ]
    torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return build([HERE / "library.cpp", *sources], torch_libraries)


class Emulator:
    """A loaded library of emulated kernels."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_launches.restype = ctypes.c_size_t
        self.library.emulator_launch.restype = ctypes.c_size_t
        self.library.emulator_launch.argtypes = [ctypes.c_size_t]
        self.library.emulator_allocate.restype = ctypes.c_void_p
        self.library.emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_ubyte]
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self._names: dict[int, str] | None = None

    def seed(self, seed: int) -> None:
        """Change the order of threads and blocks."""
        self.library.emulator_seed(seed)

    def forget_launches(self) -> None:
        self.library.emulator_forget_launches()

    def launches(self) -> list[str]:
        """Return the names of the kernels that ran since `forget_launches`."""
        return [self._name(self.library.emulator_launch(index)) for index in range(self.library.emulator_launches())]

    def guarded(self, tensor: Tensor) -> Tensor:
        """Return a copy of a CPU tensor that begins at a multiple of 16 bytes, as on a GPU, and ends where memory ends.

        A kernel that writes beyond its end fails. Reads fail from the next multiple of 16 bytes on.
        """
        if tensor.numel() == 0:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        size = tensor.numel() * tensor.element_size()
        start = self.library.emulator_allocate(size, 0xFF)
        buffer = (ctypes.c_char * size).from_address(start)
        weakref.finalize(buffer, self.library.emulator_release, ctypes.c_void_p(start))
        copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor.detach())

    def _name(self, address: int) -> str:
        """Return the name of the kernel at an address of the library, with template arguments."""
        return self._symbols().get(address, hex(address))

    def _symbols(self) -> dict[int, str]:
        if self._names is None:
            listed = subprocess.run(["nm", "-C", self.path], capture_output=True, text=True, check=True).stdout
            symbols = re.findall(r"^([0-9a-f]+) [tTwW] (.+)$", listed, re.MULTILINE)
            self._names = {int(start, 16): symbol for start, symbol in symbols}
        return self._names


@cache
def load() -> Emulator:
    """Build the operators unless that was done before, and load them into torch."""
    library = build_operators()
    torch.ops.load_library(str(library))
    return Emulator(library)


def guarded(tensor: Tensor) -> Tensor:
    """Return `Emulator.guarded` of the operators in csrc/cuda."""
    return load().guarded(tensor)


if __name__ == "__main__":
    try:
        print(build_operators())
    except DoesNotCompile as error:
        sys.exit(str(error))
