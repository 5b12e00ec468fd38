"""Say whether Triton kernels can run on an input, and launch them.

Every launch goes through `launch`, which sets the device and hands each kernel with its arguments to an observer
(`observing`): benchmarks time the kernels one by one, a test compiles them without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import cuda
from sparsecnx.backends.dispatch import Implementation
from sparsecnx.backends.selection import selected
from sparsecnx.common.dtypes import GPU_DTYPES, MOST_CHANNELS

available = importlib.util.find_spec("triton") is not None
interpreting = os.environ.get("TRITON_INTERPRET") == "1"

OLDEST_CAPABILITY = (8, 0)
PROCESSORS = 132  # of an H100, where no device says how many it has

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]
Observer = Callable[[Any, Grid, dict[str, Any]], None]

_observer: Observer | None = None
_chosen: dict[tuple[Any, ...], Any] = {}  # configurations that tuning settled on


def refusal(x: Any) -> str | None:
    """Return why the Triton kernels cannot run on `x`, anything with features; None where they can."""
    return values_refusal(x.features)


def values_refusal(values: Tensor) -> str | None:
    """Return why the Triton kernels cannot run on a tensor whose second axis are channels; None where they can."""
    if values.dtype not in GPU_DTYPES:
        return f"Triton kernels take float32, bfloat16 and float16, x is {values.dtype}"
    if not 1 <= values.shape[1] <= MOST_CHANNELS:
        return f"Triton kernels take 1 to {MOST_CHANNELS} channels, x has {values.shape[1]}"
    if values.device.type == "cpu" and selected() != "triton":
        return "Triton kernels run on the CPU only when asked for by name, under TRITON_INTERPRET=1"
    return device_refusal(values.device)


def device_refusal(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on tensors of that device; None where they can."""
    if not available:
        return "Triton is not installed"
    if device.type == "cuda":
        if interpreting:
            return "TRITON_INTERPRET=1 is set: the interpreter is for tensors on the CPU"
        capability = cuda.capability(device)
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
            return f"Triton kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
        return None
    if device.type == "cpu" and (interpreting or _observer is not None):
        return None
    return f"Triton kernels run on a GPU, x is on {device} (on the CPU under TRITON_INTERPRET=1, slowly, for tests)"


def implementation(
    module: str, function: str, refuses: Callable[[Any], str | None] = refusal, detail: str | None = None
) -> Implementation:
    """Return an operator's backend `triton`. The module of its kernels is imported only where Triton is installed.

    Args:
        module: such as "sparsecnx.ops.convolution.triton_kernels".
        function: name of the function in it that runs the operator.
        refuses: its refusal.
        detail: name of the function in it that says how it runs, see `Implementation`.
    """
    if not available:
        return Implementation(_unavailable, refuses)
    kernels = importlib.import_module(module)
    return Implementation(getattr(kernels, function), refuses, None if detail is None else getattr(kernels, detail))


def _unavailable(*_: object) -> None:
    raise AssertionError("every call is refused")


def launch(kernel: Any, grid: Grid, /, **arguments: Any) -> None:
    """Launch a kernel on the device of its tensors, in the current stream there. An empty grid is nothing to do.

    Args:
        grid: programs along up to three axes, or for tuned kernels a function of the arguments that gives them.
        **arguments: of the kernel, and options such as `num_warps`.
    """
    if not callable(grid) and 0 in grid:
        return
    if _observer is not None:
        _observer(kernel, grid, arguments)
    else:
        run(kernel, grid, **arguments)


def run(kernel: Any, grid: Grid, /, **arguments: Any) -> None:
    """Launch without telling the observer: what observers call to go on."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if hasattr(kernel, "configs"):
            _run_tuned(kernel, grid, arguments, device)
        else:
            kernel[grid](**arguments)


def tuned(half: list[Any], single: list[Any], key: list[str]) -> Callable[[Any], Any]:
    """Return `triton.autotune` for kernels that may be launched anywhere, with timings kept on disk.

    A kernel is timed on the first launch for each value of `key` and dtypes. It is not timed, but takes what was
    settled before, else the first configuration: in the interpreter, during the capture of a CUDA graph, under
    `torch.use_deterministic_algorithms`, and with SPARSECNX_AUTOTUNE=0 in the environment.

    Args:
        half: configurations for a first tensor of 16 bits, the likeliest first.
        single: those for one in float32.
        key: names of the arguments on which the choice depends, beside the dtypes.
    """
    import triton

    def prune(_: list[Any], positional: dict[str, Any], **named: Any) -> list[Any]:
        first = next(value for value in (*positional.values(), *named.values()) if isinstance(value, Tensor))
        return single if first.dtype == torch.float32 else half

    return triton.autotune(
        [*half, *single], key, prune_configs_by={"early_config_prune": prune}, cache_results=True, do_bench=_time
    )


def fitting(kernel: Any, arguments: dict[str, Any]) -> list[Any]:
    """Return the configurations of a tuned kernel that fit these arguments, the likeliest first."""
    return kernel.early_config_prune(kernel.configs, {}, **arguments)


def _run_tuned(kernel: Any, grid: Grid, arguments: dict[str, Any], device: torch.device) -> None:
    dtypes = tuple(value.dtype for value in arguments.values() if isinstance(value, Tensor))
    key = (kernel, device, dtypes, *(arguments[name] for name in kernel.keys))
    deterministic = torch.are_deterministic_algorithms_enabled()
    if key not in _chosen and not deterministic and _may_time(device):
        candidates = fitting(kernel, arguments)
        if len(candidates) > 1:
            kernel[grid](**arguments)
            _chosen[key] = kernel.best_config
            return
        _chosen[key] = candidates[0]
    known = None if deterministic else _chosen.get(key)
    config = known or fitting(kernel, arguments)[0]
    kernel.fn[grid](**arguments, **config.all_kwargs())


def _may_time(device: torch.device) -> bool:
    """Return whether a kernel may be launched repeatedly and timed on that device now."""
    if interpreting or device.type != "cuda" or os.environ.get("SPARSECNX_AUTOTUNE") == "0":
        return False
    return not torch.cuda.is_current_stream_capturing()


def _time(call: Callable[[], None], quantiles: tuple[float, ...]) -> Any:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, quantiles=quantiles)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Give every launch to `observer(kernel, grid, arguments)` instead of running it."""
    global _observer
    previous = _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = previous


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def alignment(*sizes: int) -> int:
    """Return the largest power of two up to 16 that divides all sizes.

    Triton knows by itself which integers are multiples of 16. With this, and `aligned` in the kernel, rows of 8 or 40
    channels are also moved 16 bytes at a time.
    """
    return math.gcd(16, *sizes)


def row_sizes(rows: int, channels: int, block_r: int, block_c: int) -> dict[str, int]:
    """Return the sizes of a kernel that goes over a matrix `(rows, channels)` in blocks."""
    return {"ROWS": rows, "C": channels, "BLOCK_R": block_r, "BLOCK_C": block_c, "ALIGN": alignment(channels)}


def blocks(count: int, size: int) -> int:
    """Return how many blocks of `size` cover `count`."""
    return -(-count // size)
