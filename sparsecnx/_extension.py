"""Loads the compiled operators, `torch.ops.sparsecnx.*`; where they are missing, knows why and what to do.

`sparsecnx._C` is a plain shared library, no Python module: loading it registers its operators with torch.
"""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

OLDEST_TORCH = "2.11"  # torch.__version__ compares as a version, not as a string
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Missing:
    """Why the compiled operators are not there, and what to do about it."""

    reason: str
    remedy: str


def reinstall(package: Path = PACKAGE) -> str:
    """The command that installs this package anew."""
    command = "pip install --force-reinstall --no-deps --no-cache-dir"
    source = package.parent
    if (source / "setup.py").exists():
        return f"{command} -e {shlex.quote(str(source))}"
    return f"{command} . (in the source folder of sparsecnx)"


def load(package: Path = PACKAGE) -> Missing | None:
    """Load the operators that lie in the folder `package`; None where that worked."""
    library = next(iter(sorted(package.glob("_C.*so"))), None)
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
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return Missing(f"{library.name} does not load into torch {torch.__version__}: {error}", reinstall(package))
    return None


def build_info() -> dict[str, str | None] | None:
    """How the operators were built: `version`, `compiler`, `flags`, `torch` (compiled with), `oldest_torch`,
    `cuda` and `cuda_architectures` (None without CUDA operators). None where nothing is compiled."""
    try:
        facts: dict[str, str | None] = importlib.import_module("sparsecnx._build_info").facts
    except ImportError:
        return None
    return dict(facts)


_missing = load()
loaded = _missing is None
why_not = None if _missing is None else _missing.reason
remedy = None if _missing is None else _missing.remedy
