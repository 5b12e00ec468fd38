"""Load the compiled operators or, where they are missing, say why and what to do.

`sparsecnx._C` (CPU: `torch.ops.sparsecnx.*`) and `sparsecnx._C_cuda` (GPU: `torch.ops.sparsecnx_cuda.*`, whose schemas
are in `_C`) are plain shared libraries, not Python modules. Loading them registers their operators with torch.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = "2.11"  # torch.__version__ compares as a version, not as a string
CUDA_BUILDS = "https://pytorch.org/get-started/locally"
PACKAGE = Path(__file__).parents[1]

# This version calls these operators, in the order of csrc/library.cpp. An older library can lack some.
OPERATORS = [
    "cpu_isa",
    "gather_tiles",
    "scatter_tiles",
    "kernel_map",
    "depthwise_conv",
    "depthwise_conv_weight_grad",
    "conv",
    "conv_weight_grad",
    "mapped_depthwise_conv",
    "mapped_depthwise_conv_weight_grad",
    "linear",
    "linear_weight_grad",
    "max_pool",
    "max_pool_backward",
    "sum_pool",
    "grn",
    "grn_backward",
    "layer_norm",
    "layer_norm_backward",
    "site_norm",
    "site_norm_backward",
    "scale_rows",
    "convnextv2_block",
    "convnextv2_block_backward",
]
CUDA_OPERATORS = ["depthwise_conv", "depthwise_conv_fused", "depthwise_conv_weight_grad"]


@dataclass(frozen=True)
class Missing:
    """Says why compiled operators are missing and what to do about it."""

    reason: str
    remedy: str


def reinstall(package: Path = PACKAGE, build: str = "auto") -> str:
    """Return the command that installs this package again, with that SPARSECNX_BUILD."""
    command = "pip install --force-reinstall --no-deps --no-cache-dir"
    if build != "auto":
        command = f"SPARSECNX_BUILD={build} {command}"
    source = package.parent
    if (source / "setup.py").exists():
        return f"{command} -e {shlex.quote(str(source))}"
    return f"{command} . (in the source folder of sparsecnx)"


def build_info(package: Path = PACKAGE) -> dict[str, Any] | None:
    """Return what setup.py recorded about the build in `_build.json`; None if there is no record that can be read.

    `version`, `compiler`, `flags`, `torch` (compiled with) and `oldest_torch` describe the CPU operators. `cuda` (the
    version of the toolkit), `cuda_architectures` (as in TORCH_CUDA_ARCH_LIST) and `cuda_flags` describe the GPU
    operators and are None without them. `cpu_failure` and `cuda_failure` hold the `reason` and the `remedy` where
    operators could not be compiled. `libraries` holds `size` and `blake2b`, a digest, of each library by its file name.
    An entry that is not of its type is left out, as if it were not recorded.
    """
    try:
        facts = json.loads((package / "_build.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    libraries = facts.get("libraries")
    known: dict[str, Any] = {
        "libraries": {
            name: built
            for name, built in (libraries if isinstance(libraries, dict) else {}).items()
            if isinstance(built, dict) and type(built.get("size")) is int and isinstance(built.get("blake2b"), str)
        }
    }
    for key in ("cpu_failure", "cuda_failure"):
        failure = facts.get(key)
        entries = (failure.get("reason"), failure.get("remedy")) if isinstance(failure, dict) else (None,)
        known[key] = failure if all(isinstance(entry, str) for entry in entries) else None
    texts = ("version", "compiler", "flags", "torch", "oldest_torch", "cuda", "cuda_architectures", "cuda_flags")
    return known | {key: facts[key] if isinstance(facts.get(key), str) else None for key in texts}


def load(package: Path = PACKAGE) -> Missing | None:
    """Load the CPU operators of the folder `package`. Return None if that worked."""
    library = find("_C", package)
    if library is None:
        return not_compiled("cpu", package)
    if torch.__version__ < OLDEST_TORCH:
        return Missing(
            f"the compiled operators need torch {OLDEST_TORCH} or later, this is {torch.__version__}",
            "pip install --upgrade torch",
        )
    missing = damage(library, reinstall(package)) or load_library(library, reinstall(package))
    if missing is not None:
        return missing
    lacks = [f"sparsecnx::{name}" for name in OPERATORS if not hasattr(torch.ops.sparsecnx, name)]
    lacks += [f"sparsecnx_cuda::{name}" for name in CUDA_OPERATORS if not hasattr(torch.ops.sparsecnx_cuda, name)]
    return version_mismatch(library, lacks, reinstall(package))


def load_cuda(package: Path = PACKAGE) -> Missing | None:
    """Load the GPU operators, after the CPU operators. Return None if that worked."""
    if torch.version.cuda is None:
        return Missing("this torch is built for CPU only", f"Install a CUDA build of torch: {CUDA_BUILDS}")
    remedy = reinstall(package, build="cuda")
    library = find("_C_cuda", package)
    if library is None:
        return not_compiled("cuda", package)
    missing = damage(library, remedy) or load_library(library, remedy)
    if missing is not None:
        return missing
    needed = [f"sparsecnx_cuda::{name}" for name in CUDA_OPERATORS]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return version_mismatch(library, [name for name in needed if not has_kernel(name, "CUDA")], remedy)


def not_compiled(kind: str, package: Path) -> Missing:
    """Return why the "cpu" or the "cuda" operators were not compiled."""
    again = reinstall(package, build="auto" if kind == "cpu" else kind)
    info = build_info(package)
    if info is None and (package.parent / "setup.py").exists():
        where = f"Python imports the source folder {package.parent} and not an installed sparsecnx"
        return Missing(f"not compiled: {where}; run in another folder, or `pip install -e {package.parent}`", again)
    failure = (info or {}).get(f"{kind}_failure")
    if failure is None:
        return Missing("not compiled: installed without them", again)
    return Missing(f"not compiled: {failure['reason']}", f"{failure['remedy']} Then: {again}")


def version_mismatch(library: Path, lacks: list[str], remedy: str) -> Missing | None:
    """Return what to report about a library that lacks these operators; None if it lacks nothing."""
    if not lacks:
        return None
    return Missing(f"{library.name} is of another version of sparsecnx: it lacks {', '.join(lacks)}", remedy)


def find(name: str, package: Path = PACKAGE) -> Path | None:
    """Return the shared library of that name, whatever its suffix."""
    return next(iter(sorted(package.glob(f"{name}.*so"))), None)


def damage(library: Path, remedy: str) -> Missing | None:
    """Return what to report about a library that cannot be read, or is not the one that was built; None if it is.

    Loading half a library ends the process with SIGBUS. Without a record of the build, the library itself says how long
    it is. Comparing takes 1 ms for the CPU operators and 9 ms for those of the GPU, of an import of seconds.
    """
    try:
        if library.exists() and not library.is_file():
            return Missing(f"{library} is not a file", remedy)
        content = library.read_bytes()
    except OSError as error:
        return Missing(f"{library} cannot be read: {error.strerror}", remedy)
    built = (build_info(library.parent) or {"libraries": {}})["libraries"].get(library.name)
    size, least = len(content), elf_size(content)
    if built is not None and size != built["size"]:
        found = f"it has {size:,} bytes, {built['size']:,} were built"
    elif built is not None and hashlib.blake2b(content).hexdigest() != built["blake2b"]:
        found = "its content is not what was built"
    elif size < least:
        found = f"it has {size:,} bytes, its header says at least {least:,}"
    else:
        return None
    return Missing(f"{library.name} is damaged or was changed after the build: {found}", remedy)


def elf_size(content: bytes) -> int:
    """Return the least size of a 64-bit library of Linux, by its header: that of its sections and what is mapped."""
    if len(content) < 64 or not content.startswith(b"\x7fELF\x02\x01"):
        return 0  # The loader refuses what is no library. Those of other systems have other headers.
    segments, sections, _, _, segment_size, segment_count, section_size, section_count = struct.unpack_from(
        "<QQIHHHHH", content, 32
    )
    least: int = max(sections + section_size * section_count, segments + segment_size * segment_count)
    if least <= len(content) and segment_size == 56:
        for at in range(segments, segments + segment_size * segment_count, segment_size):
            offset, _, _, length = struct.unpack_from("<QQQQ", content, at + 8)
            least = max(least, offset + length)
    return least


def load_library(library: Path, remedy: str) -> Missing | None:
    """Load a shared library into torch. Return None if that worked."""
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # the loader's own words, without torch's "Could not load this library"
        return Missing(f"{library.name} does not load into torch {torch.__version__}: {reason}", remedy)
    return None


_missing = load()
loaded = _missing is None
why_not = None if _missing is None else _missing.reason
remedy = None if _missing is None else _missing.remedy

_cuda_missing = load_cuda() if _missing is None else _missing
cuda_loaded = _cuda_missing is None
cuda_why_not = None if _cuda_missing is None else _cuda_missing.reason
cuda_remedy = None if _cuda_missing is None else _cuda_missing.remedy
