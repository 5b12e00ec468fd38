"""Loads the compiled operators; where they are missing, knows why and what to do.

`sparsecnx._C` (CPU: `torch.ops.sparsecnx.*`) and `sparsecnx._C_cuda` (GPU: `torch.ops.sparsecnx_cuda.*`, whose schemas
are in `_C`) are plain shared libraries, no Python modules: loading them registers their operators with torch.
"""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

OLDEST_TORCH = "2.11"  # torch.__version__ compares as a version, not as a string
CUDA_BUILDS = "https://pytorch.org/get-started/locally"
PACKAGE = Path(__file__).parents[1]

# What this version calls, as csrc/library.cpp defines it. Libraries left from an earlier version can lack some.
OPERATORS = [
    "cpu_isa",
    "gather_tiles",
    "scatter_tiles",
    "depthwise_conv",
    "depthwise_conv_weight_grad",
    "conv",
    "conv_backward",
    "mapped_depthwise_conv",
    "mapped_depthwise_conv_weight_grad",
    "grn",
    "grn_backward",
    "layer_norm",
    "layer_norm_backward",
    "scale_rows",
    "convnextv2_block",
    "convnextv2_block_backward",
]
CUDA_OPERATORS = [
    "gather_tiles",
    "scatter_tiles",
    "depthwise_conv",
    "depthwise_conv_fused",
    "depthwise_conv_weight_grad",
    "grn",
    "grn_backward",
    "tile_index",
    "neighbour_table",
]


@dataclass(frozen=True)
class Missing:
    """Why the compiled operators are not there, and what to do about it."""

    reason: str
    remedy: str


def reinstall(package: Path = PACKAGE, build: str = "auto") -> str:
    """The command that installs this package anew, with that SPARSECNX_BUILD."""
    command = "pip install --force-reinstall --no-deps --no-cache-dir"
    if build != "auto":
        command = f"SPARSECNX_BUILD={build} {command}"
    source = package.parent
    if (source / "setup.py").exists():
        return f"{command} -e {shlex.quote(str(source))}"
    return f"{command} . (in the source folder of sparsecnx)"


def load(package: Path = PACKAGE) -> Missing | None:
    """Load the operators of the CPU that lie in the folder `package`; None where that worked."""
    library = find("_C", package)
    if library is None:
        note = package / "_build_failure.txt"
        if not note.exists():
            return Missing(
                "not compiled: a pure Python install, or a source folder never installed", reinstall(package)
            )
        reason, _, remedy = note.read_text().strip().partition("\n")
        return Missing(f"built as pure Python because: {reason}", f"{remedy} Then: {reinstall(package)}")
    if torch.__version__ < OLDEST_TORCH:
        return Missing(
            f"the compiled operators need torch {OLDEST_TORCH} or later, this is {torch.__version__}",
            "pip install --upgrade torch",
        )
    missing = register(library, reinstall(package))
    if missing is not None:
        return missing
    lacks = [f"sparsecnx::{name}" for name in OPERATORS if not hasattr(torch.ops.sparsecnx, name)]
    lacks += [f"sparsecnx_cuda::{name}" for name in CUDA_OPERATORS if not hasattr(torch.ops.sparsecnx_cuda, name)]
    return of_another_version(library, lacks, reinstall(package))


def load_cuda(package: Path = PACKAGE) -> Missing | None:
    """Load the operators of the GPU, once those of the CPU are loaded; None where that worked."""
    if torch.version.cuda is None:
        return Missing("this torch is built for CPU only", f"Install a CUDA build of torch: {CUDA_BUILDS}")
    anew = reinstall(package, build="cuda")
    library = find("_C_cuda", package)
    if library is None:
        note = package / "_build_failure_cuda.txt"
        if not note.exists():
            return Missing("not compiled: installed without them, or a source folder never installed", anew)
        reason, _, remedy = note.read_text().strip().partition("\n")
        return Missing(f"not compiled because: {reason}", f"{remedy} Then: {anew}")
    missing = register(library, anew)
    if missing is not None:
        return missing
    needed = [f"sparsecnx_cuda::{name}" for name in CUDA_OPERATORS]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return of_another_version(library, [name for name in needed if not has_kernel(name, "CUDA")], anew)


def of_another_version(library: Path, lacks: list[str], remedy: str) -> Missing | None:
    """What to say of a library that lacks these operators; None where it lacks nothing."""
    if not lacks:
        return None
    return Missing(f"{library.name} is of another version of sparsecnx: it lacks {', '.join(lacks)}", remedy)


def find(name: str, package: Path = PACKAGE) -> Path | None:
    """The shared library with that name, whatever its suffix."""
    return next(iter(sorted(package.glob(f"{name}.*so"))), None)


def register(library: Path, remedy: str) -> Missing | None:
    """Load a shared library into torch; None where that worked."""
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # what the loader says, before torch's "Could not load this library"
        return Missing(f"{library.name} does not load into torch {torch.__version__}: {reason}", remedy)
    return None


def build_info() -> dict[str, str | None] | None:
    """How the operators were built: `version`, `compiler`, `flags`, `torch` (compiled with), `oldest_torch`,
    and of the GPU operators (None without them) `cuda` (version of the toolkit), `cuda_architectures` (as in
    TORCH_CUDA_ARCH_LIST) and `cuda_flags`. None where nothing is compiled."""
    try:
        facts: dict[str, str | None] = importlib.import_module("sparsecnx._build_info").facts
    except ImportError:
        return None
    return dict(facts)


_missing = load()
loaded = _missing is None
why_not = None if _missing is None else _missing.reason
remedy = None if _missing is None else _missing.remedy

_cuda_missing = load_cuda() if _missing is None else _missing
cuda_loaded = _cuda_missing is None
cuda_why_not = None if _cuda_missing is None else _cuda_missing.reason
cuda_remedy = None if _cuda_missing is None else _cuda_missing.remedy
