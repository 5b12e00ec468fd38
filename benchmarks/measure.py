"""Time and memory of a call: interleaved repeats, bytes kept for backward, peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

WARM_UP = 2

Call = Callable[[], object]


def interleaved(calls: dict[str, Call], repeats: int, device: torch.device, before: Call) -> dict[str, list[float]]:
    """Milliseconds of every call, `repeats` times: one of each in turn, so that a slow spell hits them all.

    Args:
        calls: what to time, by name; each runs `WARM_UP` times first.
        device: whose clock to use: events on a GPU, the wall clock on the CPU.
        before: runs before every call, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-WARM_UP, repeats):
        for name, call in calls.items():
            before()
            elapsed = milliseconds(call, device)
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def milliseconds(call: Call, device: torch.device) -> float:
    """Time of one call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def spread(times: list[float]) -> dict[str, float | list[float]]:
    """Median, minimum, quartiles, and the repeats themselves."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    summary = {"median": median, "min": min(times), "q1": q1, "q3": q3}
    return {**{name: round(value, 4) for name, value in summary.items()}, "repeats": [round(t, 4) for t in times]}


def saved_bytes(forward: Call, inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between `forward` and its backward.

    Counts every storage once, whole, whatever part of it was saved. Works alike on eager, custom and compiled
    operators: all of them save through autograd.

    Args:
        inputs: parameters, images: there with or without backward, not counted.
    """
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for tensor in inputs:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in held.values())


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory that `call` needs at its peak beyond what the process holds before it, in bytes.

    On a GPU, of torch's allocator. On the CPU, resident memory as Linux counts it, so that buffers count which
    kernels and libraries allocate for themselves: the high-water mark `VmHWM` is reset, and memory that malloc
    keeps for reuse is given back first. Measure in a fresh process (`in_fresh_process`), with code loaded.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    call()
    return process_bytes("VmHWM") - before


def process_bytes(field: str) -> int:
    """A memory field of `/proc/self/status`."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux alone")
    return 1024 * int(match[1])


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a Python process of its own, in which nothing has been allocated yet."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)
