"""Whether the MinkowskiEngine library can run here. Nothing is imported before somebody asks for it."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

NAME = "MinkowskiEngine"
STAND_IN = "sparsecnx.compat.minkowski"  # may answer to the same name, see there
NOT_INSTALLED = "not installed"
ANSWERED = f"answered by {STAND_IN} in this process"

_importing = threading.RLock()


def problem() -> str | None:
    """What the library is instead of usable, to follow "MinkowskiEngine is"; None where it imports."""
    try:
        found = library()
    except ModuleNotFoundError as error:
        return NOT_INSTALLED if error.name == NAME else f"installed, but does not import: {error}"
    except Exception as error:  # what a broken installation raises is its own choice
        return f"installed, but does not import: {error}"
    return ANSWERED if found.__name__.startswith(STAND_IN) else None


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
    """The module `MinkowskiEngine`, or what answers to that name. Threads wait for the one that imports it.

    Raises:
        ImportError, or whatever else a broken installation raises.
    """
    with _importing:
        if NAME in sys.modules:
            return importlib.import_module(NAME)  # waits for a thread that imports it on its own
        with _old_collections(), _its_threads(), warnings.catch_warnings():
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


@contextlib.contextmanager
def _its_threads() -> Iterator[None]:
    """OMP_NUM_THREADS as MinkowskiEngine chooses it on more than 16 cores, for its own OpenMP and without its warning:
    on its own it leaves the variable set, for torch in every child of this process."""
    if "OMP_NUM_THREADS" in os.environ or (os.cpu_count() or 1) <= 16:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "16"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
