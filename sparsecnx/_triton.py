"""Whether Triton kernels can run here, and the one door through which they are launched.

Every launch goes through `launch`, so that one place looks after the device, and an observer (`observing`) sees
each kernel with its arguments: benchmarks time them one by one, the resource table compiles them without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

available = importlib.util.find_spec("triton") is not None
interpreting = os.environ.get("TRITON_INTERPRET") == "1"

OLDEST_CAPABILITY = (8, 0)
PROCESSORS = 132  # of an H100, where no device says how many it has

Grid = tuple[int, ...]
Observer = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]

_observer: Observer | None = None


def refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of that device; None where they can."""
    if not available:
        return "Triton is not installed"
    if device.type == "cuda":
        if interpreting:
            return "TRITON_INTERPRET=1 is set: the interpreter is for tensors on the CPU"
        capability = _capability(device)
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
            return f"Triton kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
        return None
    if device.type == "cpu" and (interpreting or _observer is not None):
        return None
    return f"Triton kernels run on a GPU, x is on {device} (on the CPU under TRITON_INTERPRET=1, slowly, for tests)"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU: what torch.compile may ask while tracing, but cannot put into a graph."""
    return torch.cuda.get_device_capability(device)


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors, in the current stream there. An empty grid is nothing to do."""
    if 0 in grid:
        return
    if _observer is not None:
        _observer(kernel, grid, arguments, options)
    else:
        run(kernel, grid, *arguments, **options)


def run(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Launch without telling the observer: what observers call to go on."""
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Give every launch to `observer(kernel, grid, arguments, options)` instead of running it."""
    global _observer
    previous = _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = previous


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that cover `count`."""
    return -(-count // size)
