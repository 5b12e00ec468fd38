"""Measure time and memory, keep results in a file, and print tables: what all benchmarks share.

A results file is JSON, written as a whole after every case:

    {"runs": {RUN: {"date", "command", "machine", "versions"}}, "cases": {KEY: {"run": RUN, ...}}}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import sparsecnx
from sparsecnx.common.files import write_atomically
from sparsecnx.geometry.masks import random_mask, visible_count
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import STRIDE

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3
QUEUED = 5  # calls that a GPU is given at once, so that it never waits for the host as long as the host is faster
# Largest ||got - expected|| / ||expected|| of an output or a gradient. In 16 bits rounding alone may bring the eager
# dense encoder's own gradients above it, which encoder.py allows for.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}

# Kinds of operators, by what their names start with after `aten::` or another namespace. The first that fits counts.
PARTS = {
    "fused block": "convnextv2_block",
    "products": "(linear|linear_weight_grad|_linear_pointwise|addmm|_?mm|mv|addmv|baddbmm|bmm)$",
    "depthwise": "(mapped_)?depthwise|_conv_depthwise",
    "convolution": "_?(slow_|thnn_|mkldnn_)?conv",
    "pooling": r"\w*pool",
    "elementwise": r"\w*(norm|grn|elu|silu|hard|sigmoid|tanh|softmax|threshold|clamp|scale_rows"
    r"|(add|sub|mul|div|sum|mean|sqrt|pow|square|lerp|masked_fill|where)_?$)",
}

Call = Callable[[], object]


class Mismatch(Exception):
    """Two computations that should agree do not."""


# Time


def nothing() -> None:
    """Do nothing, before a call that needs no preparation."""


def milliseconds(call: Call, device: torch.device, before: Call = nothing, clock: str = "wall") -> float:
    """Return the time of one call; on a GPU the mean of `QUEUED` calls, launched one after another.

    Args:
        clock: "wall", or on the CPU "process": the CPU time of all threads, which other processes lengthen less.
    """
    if device.type != "cuda":
        now = time.perf_counter if clock == "wall" else time.process_time
        before()
        begin = now()
        call()
        return 1e3 * (now() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(QUEUED):
        before()
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / QUEUED


def interleaved(
    calls: Mapping[str, Call], repeats: int, device: torch.device, before: Call = nothing, clock: str = "wall"
) -> dict[str, dict[str, Any]]:
    """Time every call `repeats` times, one of each in turn, so that a slow spell hits them all.

    Args:
        calls: what to time, by name. Each runs `WARM_UP` times first.
        before: runs before every call; on the CPU it is not timed.
        clock: see `milliseconds`.

    Returns:
        For each name the `spread` of its times in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-WARM_UP, repeats):
        for name, call in calls.items():
            elapsed = milliseconds(call, device, before, clock)
            if repeat >= 0:
                times[name].append(elapsed)
    return {name: spread(found) for name, found in times.items()}


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, quartiles, and the repeats themselves."""
    repeats = [round(time, 4) for time in times]
    q1, median, q3 = statistics.quantiles(repeats, n=4, method="inclusive") if len(times) > 1 else repeats * 3
    return {"median": round(median, 4), "min": min(repeats), "q1": round(q1, 4), "q3": round(q3, 4), "repeats": repeats}


def anatomy(step: Call, repeats: int, before: Call = nothing) -> dict[str, Any]:
    """Return where a step spends its time on a CPU, by operators as torch's profiler sees them.

    Args:
        before: see `interleaved`.

    Returns:
        Of the repeat of median time, in milliseconds: `ms`, its time, which the profiler lengthens a little; `parts`,
        whose sum that is: the operators of each of `PARTS`, `rest`: all other operators, which pack, copy and allocate,
        and `python`: what is outside of operators, such as autograd; `operators`: the 20 that take most, each without
        the operators that it calls.
    """
    runs = []
    for _ in range(1 + repeats):  # the first starts the profiler
        before()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            ms = milliseconds(step, torch.device("cpu"))
        runs.append((ms, profiler.key_averages()))
    ms, events = sorted(runs[1:], key=lambda run: run[0])[repeats // 2]
    # Leave out what autograd does between operators, which is profiled under names such as `MmBackward0`.
    times = {event.key: event.self_cpu_time_total / 1e3 for event in events if re.fullmatch(r"\w+::\w+", event.key)}
    parts = dict.fromkeys([*PARTS, "rest"], 0.0)
    for name, time_of_one in times.items():
        parts[part_of(name)] += time_of_one
    parts["python"] = max(0.0, ms - sum(times.values()))
    largest = sorted(times, key=lambda name: -times[name])[:20]
    return {
        "ms": round(ms, 4),
        "parts": {part: round(value, 4) for part, value in parts.items()},
        "operators": {name: round(times[name], 4) for name in largest},
    }


def part_of(operator: str) -> str:
    """Return which of `PARTS` an operator belongs to, or "rest"."""
    name = operator.partition("::")[2]
    return next((part for part, pattern in PARTS.items() if re.match(pattern, name)), "rest")


def print_anatomies(anatomies: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the parts of each `anatomy`, by case, with the operators that take most of them."""
    rows = []
    for case, found in anatomies.items():
        for part, ms in found["parts"].items():
            operators = [f"{name} {one:.3g}" for name, one in found["operators"].items() if part_of(name) == part]
            if ms:
                rows.append([case, part, ms, ms / found["ms"], ", ".join(operators[:4])])
    if rows:
        print_table(["forward + backward", "part", "ms", "of the step", "its largest operators, ms"], rows)


def captured(step: Callable[[], Any], reset: Call, device: torch.device) -> Callable[[], Any]:
    """Capture a step as a CUDA graph and return the call that replays it, which returns the output of the step."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            reset()
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure what kernels are held against.

    Returns:
        Per second, `bytes`: those of a copy in memory, read and written; `matrix`: FLOPs of a large square matrix
        product in `dtype`; `vector`: FLOPs of float32 multiply-adds, from the number of processors and their highest
        clock, and on the CPU infinite, since it is not known.
    """
    on_gpu = device.type == "cuda"
    source = torch.rand(2**28 if on_gpu else 2**22, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 512
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    ms = {name: found["median"] for name, found in interleaved(calls, 9, device).items()}
    vector = math.inf
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        vector = 2.0 * 128 * properties.multi_processor_count * 1e3 * properties.clock_rate
    return {
        "bytes": 2e3 * source.numel() * source.element_size() / ms["copy"],
        "matrix": 2e3 * side**3 / ms["product"],
        "vector": vector,
    }


# Memory


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps between `forward` and its backward.

    On a GPU that is what the allocator holds more than before, without the output. On the CPU every storage that is
    saved counts once, as a whole.

    Args:
        inputs: parameters and images, which are there with or without backward and do not count.
    """
    inputs = list(inputs)
    if inputs[0].device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = forward()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
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
    """Return the memory that `call` needs at its peak beyond what is held before it, in bytes.

    On a GPU this is memory of torch's allocator. On the CPU it is resident memory as Linux counts it, so that buffers
    count which libraries allocate for themselves. Measure there `in_fresh_process`, with code loaded.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # gives back what malloc keeps for reuse
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _process_bytes("VmRSS")
    call()
    return _process_bytes("VmHWM") - before


def _process_bytes(field: str) -> int:
    """Return a memory field of `/proc/self/status`, which Linux alone has."""
    found = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[0])


@functools.cache
def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)` from a new Python process, in which nothing has been allocated yet. Equal calls share
    one process and its result."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# Correctness


def relative_error(got: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """Return ||got - expected|| / max(||expected||, least), nan where either is nan."""
    got, expected = got.detach(), expected.detach()
    difference = torch.linalg.vector_norm(got.to(expected.dtype) - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp(min=least))


def compare(
    who: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    limit: float | tuple[float, float],
    least: float = 0.0,
) -> dict[str, Any]:
    """Compare an output and gradients by name with the expected ones.

    Args:
        limit: the largest error, or that of the output and that of a gradient.
        least: a gradient counts as at least this fraction of the largest one. A bias before a convolution and a
            BatchNorm has the gradient zero, of which any rounding is a large fraction.

    Returns:
        `output`: its relative error; `gradient`: the largest of the gradients; `parameter`: whose gradient that is.

    Raises:
        Mismatch: an error is above `limit`, or nan.
    """
    norms = [float(torch.linalg.vector_norm(value)) for name, value in expected.items() if name != "output"]
    floor = max(1e-30, least * max(norms))
    errors = {
        name: relative_error(found[name], value, 1e-30 if name == "output" else floor)
        for name, value in expected.items()
    }
    output = errors.pop("output")
    parameter = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    limits = limit if isinstance(limit, tuple) else (limit, limit)
    for name, error, most in (("output", output, limits[0]), (parameter, errors[parameter], limits[1])):
        if not error <= most:
            raise Mismatch(f"{who} differs from the expected result: {name} by {error:.1e}, at most {most:g}")
    return {"output": output, "gradient": errors[parameter], "parameter": parameter}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters by name; zeros for a parameter without one."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return autocast to a dtype, which does nothing for float32."""
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")


# Results and tables


class Results:
    """A results file. A case that is measured again replaces its earlier self.

    Args:
        path: read where it exists, made with its folder otherwise. None: results are not written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"runs": {}, "cases": {}}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
        self.facts = describe_run()
        self.run: str = self.facts["date"]

    def add(self, key: str, case: dict[str, Any]) -> None:
        """Add a case of this run, drop runs of which no case is left, and write the file."""
        runs, cases = {**self.content["runs"], self.run: self.facts}, self.content["cases"]
        cases[key] = {"run": self.run, **case}
        used = {case["run"] for case in cases.values()}
        self.content = {"runs": {run: runs[run] for run in sorted(used)}, "cases": dict(sorted(cases.items()))}
        if self.path is not None:
            # The numbers of a list, which are repeats, stand on one line.
            text = json.dumps(self.content, indent=1)
            text = re.sub(r"\[([\s\d.,]+)\]", lambda match: f"[{' '.join(match[1].split())}]", text)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text + "\n")


def describe_run() -> dict[str, Any]:
    """Say when, how and on what this process measures: date, command, machine and versions."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    machine = {
        "cpu": models[0].strip() if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "sparsecnx": sparsecnx.__version__}
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    packages = {package: installed.get(package) for package in ("triton", "timm", "transformers", "MinkowskiEngine")}
    # The commit of the checkout, with `-dirty` where files differ from it; None outside a checkout.
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "machine": machine,
        "versions": {**versions, **packages, "commit": commit},
    }


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, floats with four significant digits."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        say("rich is not installed: no table (pip install rich)")
        return
    table = Table(*head, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=200, highlight=False, markup=False).print(table)


def say(line: str) -> None:
    """Print a line on how far the benchmark has got."""
    print(line, file=sys.stderr, flush=True)


# Cases and command lines


@dataclass(frozen=True, order=True)
class Case:
    """One setting of a model. `ratio` comes last: in order, cases that differ in it alone stand together."""

    dtype: str
    device: str
    threads: int
    size: str
    batch: int
    image: int
    ratio: float

    @property
    def key(self) -> str:
        setting = f"{self.size}-mask{self.ratio:g}-batch{self.batch}-{self.image}px"
        return f"{setting}-{self.dtype}-{self.device}-{self.threads}threads"

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image // STRIDE, self.image // STRIDE)

    @property
    def visible(self) -> int:
        return visible_count(self.grid[0] * self.grid[1], self.ratio)

    def images(self) -> Tensor:
        """Return images `(B, 3, H, W)`, which are drawn on the CPU and so the same on every device."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.image, self.image, generator=generator).to(self.device)

    def mask(self) -> Tensor:
        """Return the mask `(B, gh, gw)`, likewise."""
        mask = random_mask(self.batch, self.grid, self.ratio, generator=torch.Generator().manual_seed(0))
        return mask.view(-1, *self.grid).to(self.device)


def parser(description: str | None, variants: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks of models share, see `parse`.

    Args:
        variants: what --variants chooses from, where the benchmark has that option.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["atto", "tiny"], metavar="NAME")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.6], help="mask ratio, in [0, 1)")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--image", nargs="+", type=int, default=[224], help=f"pixels, a multiple of {STRIDE}")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="other than float32 by autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="results file (JSON); cases that it already holds are replaced")
    if variants:
        parser.add_argument("--variants", nargs="+", choices=variants, help="by default all that the device can run")
        parser.add_argument("--by-block", action="store_true", help="compile the dense encoders block by block")
        parser.set_defaults(all_variants=variants)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, or end the process with an error that names the one that is wrong."""
    options = parser.parse_args(arguments)
    for name in ("batch", "image", "threads", "repeats"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} is {value}: expected 1 or more")
    for image in options.image:
        if image % STRIDE:
            parser.error(f"--image is {image}: expected a multiple of {STRIDE}")
    try:
        _ = [case.visible for case in cases(options)]
    except ValueError as error:
        parser.error(str(error))
    if "variants" in options and options.variants is None:
        on_gpu = torch.device(options.device).type == "cuda"
        options.variants = [name for name in options.all_variants if on_gpu or name != "sparse_graph"]
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Return a case for every combination of size, batch, image and ratio."""
    fixed = (options.dtype, options.device, options.threads)
    return [
        Case(*fixed, *axes) for axes in itertools.product(options.size, options.batch, options.image, options.ratio)
    ]


def run_cases(
    cases: Sequence[Any],
    run: Callable[[Any], dict[str, Any]],
    results: Results,
    print_tables: Callable[[Sequence[dict[str, Any]]], None],
) -> int:
    """Run the cases, write each as soon as it is measured, and print their tables.

    Returns:
        The exit code: 1 if the run of a case raised Mismatch, which ends the benchmark.
    """
    found = []
    try:
        for number, case in enumerate(cases, start=1):
            say(f"[{number}/{len(cases)}] {case.key}")
            found.append(run(case))
            results.add(case.key, found[-1])
    except Mismatch as error:
        say(f"not timed: {error}")
        return 1
    finally:
        print_tables(found)
    return 0
