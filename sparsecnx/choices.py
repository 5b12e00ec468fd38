"""Which of the CUDA C++ and the Triton kernels is faster on a GPU, by measurement.

`auto` takes Triton on a GPU unless `data/gpu_choices.json` shows that CUDA is faster for that operator and shape.
`python benchmarks/choices.py` measures and writes that file:

    {"runs": [
      {"gpu": "NVIDIA H200", "capability": [9, 0], "date": "2026-11-30",
       "torch": "2.14.1+cu130", "triton": "3.8.0", "toolkit": "13.0",
       "times": [
         {"step": "depthwise_conv", "dtype": "bfloat16", "channels": 96, "tile": 8, "kernel": [7, 7], "rows": 81536,
          "triton_ms": 0.2, "cuda_ms": 0.1}]}]}

A *step* is an operator of `torch.ops.sparsecnx_cuda`, timed beside the Triton kernels that do the same:

    depthwise_conv              convolution with bias; the input's gradient is another
    depthwise_conv_fused        with the LayerNorm of the fused block (eps given, no residual)
    depthwise_conv_weight_grad
    grn, grn_backward           over the visible rows of each image; tile is null, kernel []
    gather_tiles, scatter_tiles contiguous dense tensor; kernel []
    geometry                    index, splits, slots and neighbour tables of radius 1, 2 and 3 from a mask whose
                                `visible` is known; dtype float32, channels 1, tile null, kernel [], for none of them
                                matters. There is no Triton kernel: triton_ms is the time of torch's operators, which
                                do this wherever Triton runs

An operator is chosen as a whole, by the sum of its forward and backward steps. Each step is looked up among the runs on
GPUs of the same compute capability, on this very model before others: same dtype, tile and kernel, 16-byte rows or not
alike, and the nearest number of channels within a factor of `FURTHEST`; then the most rows, then the latest run. `rows`
is not matched: a choice that changed with what a mask leaves visible would change results, and break compiled graphs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch

PATH = Path(__file__).parent / "data" / "gpu_choices.json"
FURTHEST = 1.5
STEPS = (
    "depthwise_conv",
    "depthwise_conv_fused",
    "depthwise_conv_weight_grad",
    "grn",
    "grn_backward",
    "gather_tiles",
    "scatter_tiles",
    "geometry",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Measurement:
    """Times of one step on one GPU, in milliseconds."""

    gpu: str
    capability: tuple[int, int]
    date: str
    step: str
    dtype: torch.dtype
    channels: int
    tile: int | None
    kernel: tuple[int, ...]
    rows: int
    triton_ms: float
    cuda_ms: float


@dataclass(frozen=True)
class Comparison:
    """The faster of the two, and how that is known.

    Attributes:
        backend: "triton" also where nothing is known.
        measured: whether it is known.
        reason: for people.
    """

    backend: Literal["cuda", "triton"]
    measured: bool
    reason: str


def read(path: Path) -> tuple[Measurement, ...]:
    """The measurements in a file.

    Raises:
        ValueError: it is not in the format above; names the file and the place.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found: list[Measurement] = []
    for i, run in enumerate(_field(path, "", content, "runs", list)):
        at = f"runs[{i}]"
        gpu, date = (_field(path, at, run, name, str) for name in ("gpu", "date"))
        for version in ("torch", "triton", "toolkit"):
            _field(path, at, run, version, str)
        capability = _integers(path, at, run, "capability", 0)
        if len(capability) != 2:
            raise _wrong(path, f"{at}.capability", capability, "[major, minor]")
        for j, entry in enumerate(_field(path, at, run, "times", list)):
            found.append(_measurement(path, f"{at}.times[{j}]", entry, gpu, (capability[0], capability[1]), date))
    return tuple(found)


def _measurement(path: Path, at: str, entry: Any, gpu: str, capability: tuple[int, int], date: str) -> Measurement:
    step, dtype = (_field(path, at, entry, name, str) for name in ("step", "dtype"))
    for name, value, known in (("step", step, STEPS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise _wrong(path, f"{at}.{name}", value, f"one of {', '.join(known)}")
    sizes = {name: _field(path, at, entry, name, int) for name in ("channels", "rows")}
    tile = _field(path, at, entry, "tile", (int, type(None)))
    for name, value in (*sizes.items(), ("tile", tile)):
        if value is not None and value < 1:
            raise _wrong(path, f"{at}.{name}", value, "1 or more")
    times = {name: _field(path, at, entry, name, (int, float)) for name in ("triton_ms", "cuda_ms")}
    for name, value in times.items():
        if not 0 < value < float("inf"):
            raise _wrong(path, f"{at}.{name}", value, "a positive time")
    kernel = _integers(path, at, entry, "kernel", 1)
    return Measurement(
        gpu, capability, date, step, DTYPES[dtype], sizes["channels"], tile, kernel, sizes["rows"], **times
    )


def _field(path: Path, at: str, owner: Any, name: str, kind: Any) -> Any:
    value = owner.get(name, _MISSING) if isinstance(owner, dict) else _MISSING
    place = f"{at}.{name}" if at else name
    if value is _MISSING:
        raise ValueError(f"{path}: {place} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _wrong(path, place, value, _KINDS[kind])
    return value


def _integers(path: Path, at: str, owner: Any, name: str, least: int) -> tuple[int, ...]:
    values = _field(path, at, owner, name, list)
    if not all(type(value) is int and value >= least for value in values):
        raise _wrong(path, f"{at}.{name}", values, f"integers from {least} on")
    return tuple(values)


def _wrong(path: Path, place: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{path}: {place} is {value!r}: expected {expected}")


_MISSING = object()
_KINDS: dict[Any, str] = {
    list: "a list",
    str: "a string",
    int: "an integer",
    (int, float): "a number",
    (int, type(None)): "an integer or null",
}
_measurements = read(PATH)


def compare(
    steps: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    tile: int | None = None,
    kernel: tuple[int, ...] = (),
) -> Comparison:
    """The faster of CUDA and Triton for an operator that runs `steps`, on a GPU.

    Args:
        tile: sites per tile side; None where it does not matter to the operator.
        kernel: sites per axis; () where there is none.
    """
    # Of sizes that torch.compile leaves open, index() takes what they are and guards it; int() would not.
    side = None if tile is None else index(tile)
    return _compare_fixed(steps, device, dtype, index(channels), side, tuple(index(size) for size in kernel))


@torch.compiler.assume_constant_result
def _compare_fixed(*key: Any) -> Comparison:
    return _compare(*key)


@functools.cache
def _compare(
    steps: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    tile: int | None,
    kernel: tuple[int, ...],
) -> Comparison:
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    here = [entry for entry in _measurements if entry.capability == capability]
    if not here:
        return Comparison("triton", False, f"no measurement on this GPU, {gpu}: Triton")
    found = [_nearest(here, gpu, step, dtype, channels, tile, kernel) for step in steps]
    known = [entry for entry in found if entry is not None]
    if len(known) < len(found):
        shape = _shape(channels, tile, kernel)
        return Comparison("triton", False, f"no measurement near {shape} in {_name(dtype)}: Triton")
    cuda, triton = sum(entry.cuda_ms for entry in known), sum(entry.triton_ms for entry in known)
    shape, where = _shape(known[0].channels, tile, kernel), " and ".join(dict.fromkeys(entry.gpu for entry in known))
    if cuda < triton:
        return Comparison("cuda", True, f"measured {cuda / triton:.2f} of Triton's time at {shape} on {where}")
    return Comparison("triton", True, f"measured {triton / cuda:.2f} of CUDA's time at {shape} on {where}")


def _nearest(
    entries: list[Measurement],
    gpu: str,
    step: str,
    dtype: torch.dtype,
    channels: int,
    tile: int | None,
    kernel: tuple[int, ...],
) -> Measurement | None:
    """The measurement that speaks for a step at that shape, if one does."""

    def packed(count: int) -> bool:
        return count * dtype.itemsize % 16 == 0

    def distance(entry: Measurement) -> float:
        return max(entry.channels / channels, channels / entry.channels)

    fitting = [
        entry
        for entry in entries
        if (entry.step, entry.dtype, entry.tile, entry.kernel) == (step, dtype, tile, kernel)
        and packed(entry.channels) == packed(channels)
        and distance(entry) <= FURTHEST
    ]
    fitting.sort(key=lambda entry: entry.date, reverse=True)
    return min(fitting, key=lambda entry: (entry.gpu != gpu, distance(entry), -entry.rows), default=None)


def _shape(channels: int, tile: int | None, kernel: tuple[int, ...]) -> str:
    words = [f"C={channels}"]
    if tile is not None:
        words.append(f"tile {tile}")
    if kernel:
        words.append("x".join(map(str, kernel)))
    return ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
