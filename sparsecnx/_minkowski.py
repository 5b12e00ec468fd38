"""Whether the MinkowskiEngine library can run here. Nothing is imported before somebody asks for it."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

NAME = "MinkowskiEngine"
STAND_IN = "sparsecnx.compat.minkowski"  # may answer to the same name, see there


def problem() -> str | None:
    """What the library is instead of usable, to follow "MinkowskiEngine is"; None where it imports."""
    try:
        library()
    except ModuleNotFoundError as error:
        return "not installed" if error.name == NAME else f"installed, but does not import: {error}"
    except Exception as error:  # what a broken installation raises is its own choice
        return f"installed, but does not import: {error}"
    if sys.modules[NAME].__name__.startswith(STAND_IN):
        return f"answered by {STAND_IN} in this process"
    return None


def refusal(device: torch.device) -> str | None:
    """Why MinkowskiEngine cannot run on tensors of that device; None where it can."""
    found = problem()
    if found is not None:
        return f"{NAME} is {found}"
    if device.type == "cuda" and not library().is_cuda_available():
        return f"{NAME} is built for the CPU only, x is on {device}"
    if device.type not in ("cpu", "cuda"):
        return f"{NAME} runs on the CPU and on CUDA, x is on {device}"
    return None


def library() -> Any:
    """The module `MinkowskiEngine`, or what answers to that name.

    Raises:
        ImportError, or whatever else a broken installation raises.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    with _old_collections(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The MinkowskiEngine was compiled with CPU_ONLY flag")
        return importlib.import_module(NAME)


@contextlib.contextmanager
def _old_collections() -> Iterator[None]:
    """As before Python 3.10: `from collections import Sequence`, which version 0.5.4 writes."""
    missing = [name for name in collections.abc.__all__ if not hasattr(collections, name)]
    for name in missing:
        setattr(collections, name, getattr(collections.abc, name))
    try:
        yield
    finally:
        for name in missing:
            delattr(collections, name)
