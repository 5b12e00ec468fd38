"""Time and memory of training steps on a GPU, each variant in a process of its own, written as soon as it is known.

What encoder_step.py and fcmae_step.py share. A variant is a function that makes a `Step` at a batch size; its
process measures it and adds it to the results file, where the case `{"variants": {NAME: {...}}}` collects what was
measured at one setting. A variant that fails is in the file too, with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import isolated
import measure
import torch
from isolated import Outcome, Task
from record import Results
from torch import Tensor

from sparsecnx import choices
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import ConvNeXtV2Encoder, masked_dense
from sparsecnx.models.convnextv2 import STRIDE

BATCHES = (256, 128, 64, 32)
WARM_UP = 3
LEAST_REPEATS, MOST_REPEATS = 5, 50


@dataclass
class Step:
    """One step of training, to be measured.

    Attributes:
        run: does it, queueing its work on the device.
        reset: before every step: drops gradients.
        inputs: weights and images, there with or without the step.
        check: facts about its correctness, such as errors against a reference, for the results file. Its item
            `agrees`, where there is one, says whether they are as they should be. Called after the first step, or
            after a replay of the captured one.
        forward: the part of `run` before backward, where what it keeps for backward is to be measured.
    """

    run: Callable[[], object]
    reset: Callable[[], object]
    inputs: Iterable[Tensor]
    check: Callable[[], dict[str, Any]] = dict
    forward: Callable[[], Any] | None = None


Build = Callable[[int], Step]


@dataclass(frozen=True)
class Variant:
    """A way to do the step of a case.

    Attributes:
        name: in the results file.
        case: what it is a way of: the case's settings without the batch; `size` is one of them.
        build: makes the step at a batch size, in the process that measures it.
        graph: whether the step is captured as a CUDA graph and replayed.
    """

    name: str
    case: dict[str, Any]
    build: Build
    graph: bool = False

    def key(self, batch: int) -> str:
        """The case's key in the results file."""
        c = self.case
        return f"{c['size']}-mask{c['ratio']:g}-batch{batch}-{c['image']}px-{c['dtype']}-{c['device']}"


def measured(step: Step, device: torch.device, graph: bool, seconds: float) -> dict[str, Any]:
    """Milliseconds and bytes of a step.

    Args:
        step: what to measure.
        device: where it runs.
        graph: replay it as a CUDA graph.
        seconds: about how long to repeat it.

    Returns:
        ms: see `measure.spread`.
        peak_bytes: the peak of a step over weights, images and optimizer state before it, gradients included.
        total_bytes: the peak of all that torch's allocator holds.
        saved_bytes: what is kept between forward and backward, where `step.forward` tells them apart.
        first_s: seconds of the first step, compiling included.
    """
    begin = time.perf_counter()
    step.reset()
    step.run()
    synchronize(device)
    result: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 2)}
    if not graph:
        result.update(step.check())
    for _ in range(WARM_UP - 1):
        step.reset()
        step.run()
    step.reset()
    if step.forward is not None:
        result["saved_bytes"] = saved_bytes(step, device)
    if graph:
        run, memory = captured(step, device)
        result.update({**memory, **step.check()})
        reset: Callable[[], object] = lambda: None  # noqa: E731 - gradients stay where the graph writes them
    else:
        result.update(peak_bytes_of(step.run, device))
        run, reset = step.run, step.reset
    reset()
    run()
    (once,) = timed(run, reset, device, 1)
    least = LEAST_REPEATS if device.type == "cuda" else 2
    repeats = max(least, min(MOST_REPEATS, int(1e3 * seconds / max(once, 1e-3))))
    result["ms"] = measure.spread(timed(run, reset, device, repeats))
    return result


def timed(run: Callable[[], object], reset: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of every step when steps follow each other as in training: the device is not waited for."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            reset()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        reset()
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def peak_bytes_of(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """`peak_bytes` and `total_bytes` of a call, of torch's allocator; nothing on the CPU, which has none."""
    if device.type != "cuda":
        return {}
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak - before, "total_bytes": peak}


def saved_bytes(step: Step, device: torch.device) -> int:
    """Bytes that a step keeps between its forward and its backward, its output not counted.

    On a GPU, what the allocator holds more after forward; compiled code is measured without being compiled anew
    for the hooks that count tensors on the CPU.
    """
    assert step.forward is not None
    if device.type != "cuda":
        return measure.saved_bytes(step.forward, step.inputs)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    out = step.forward()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()


def captured(step: Step, device: torch.device) -> tuple[Callable[[], object], dict[str, Any]]:
    """The step as a CUDA graph: what replays it, and the memory of capturing it, which is that of every replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step.reset()
            step.run()
        step.reset()
    torch.cuda.current_stream(device).wait_stream(stream)
    gc.collect()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            step.run()

    memory = peak_bytes_of(capture, device)
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay, memory


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: str) -> dict[str, Any]:
    """Name and memory of a device, asked in a process of its own: see isolated.py."""
    (outcome,) = isolated.outcomes([Task("device", _facts, (device,), 120)])
    if outcome.status != "done":
        raise RuntimeError(f"{device}: {isolated.last_line(outcome.error) or outcome.status}")
    return outcome.value


def _facts(device: str) -> dict[str, Any]:
    if torch.device(device).type != "cuda":
        return {"name": "cpu", "memory_bytes": 0}
    properties = torch.cuda.get_device_properties(device)
    torch.zeros(1, device=device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "processors": properties.multi_processor_count,
    }


def _measure(variant: Variant, batch: int, path: Path, run: str, seconds: float) -> dict[str, Any]:
    """Measure a variant and add it to the results file. In a process of its own."""
    device = torch.device(variant.case["device"])
    torch.manual_seed(0)
    try:
        found = measured(variant.build(batch), device, variant.graph, seconds)
    except Exception as error:
        # Compilers wrap the error in one of their own.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return {"out_of_memory": isolated.reason(error)}
        raise
    found["images_per_s"] = round(1e3 * batch / found["ms"]["median"], 1)
    add(path, run, variant, batch, found)
    return found


def add(path: Path, run: str, variant: Variant, batch: int, found: dict[str, Any]) -> None:
    """Add what was found out about a variant to its case."""
    results = Results(path, run)
    key = variant.key(batch)
    case = results.content["cases"].get(key, {})
    variants = {**case.get("variants", {}), variant.name: found}
    results.add(key, {**variant.case, "batch": batch, "variants": variants})


class Runner:
    """Measures variants one after another, until its time is up.

    Args:
        path: the results file.
        deadline: in `time.monotonic()`.
        seconds: about how long to repeat a step.
        limit: seconds after which a variant is given up.
    """

    def __init__(self, path: Path, deadline: float, seconds: float, limit: float) -> None:
        self.path, self.deadline, self.seconds, self.limit = path, deadline, seconds, limit
        self.run = Results(path).run
        self.failed = False

    def measure(self, variant: Variant, batches: Sequence[int]) -> int | None:
        """Measure a variant at the first of `batches` that fits; returns that one, or None where none did.

        What went wrong is written to the results file, under the batch it went wrong at.
        """
        for batch in batches:
            arguments = (variant, batch, self.path, self.run, self.seconds)
            task = Task(f"{variant.name} {variant.key(batch)}", _measure, arguments, self.limit)
            (outcome,) = isolated.outcomes([task], deadline=self.deadline)
            say(outcome)
            if outcome.status != "done":
                self.failed = True
                error = isolated.last_line(outcome.error)
                found = {"status": outcome.status, "error": error, "trace": outcome.error[-4000:]}
                # In a process of its own like every other: describing the machine touches the GPU.
                list(isolated.outcomes([Task("note", add, (self.path, self.run, variant, batch, found))]))
                return None
            if "out_of_memory" not in outcome.value:
                self.failed |= outcome.value.get("agrees") is False
                return batch
        self.failed = True
        print(f"  {variant.name}: fits at none of the batches {', '.join(map(str, batches))}", file=sys.stderr)
        return None


def say(outcome: Outcome) -> None:
    """A line on how measuring went."""
    if outcome.status != "done":
        text = f"{outcome.status}: {isolated.last_line(outcome.error)}"
    elif "out_of_memory" in outcome.value:
        text = "out of memory"
    else:
        found = outcome.value
        text = f"{found['ms']['median']:.2f} ms, {found['images_per_s']:.0f} images/s"
        if "peak_bytes" in found:
            text += (
                f", peak {found['peak_bytes'] / 2**30:.2f} GiB over weights, {found['total_bytes'] / 2**30:.2f} in all"
            )
        if found.get("agrees") is False:
            text += f", WRONG: {found.get('errors', found.get('loss'))}"
    print(f"  {outcome.task.name}: {text} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)


def batches_to_try(asked: Sequence[int], bytes_per_image: float, memory: int) -> list[int]:
    """The batches that may fit, largest first: those expected to be well above the device's memory are not tried.

    Args:
        asked: all of them.
        bytes_per_image: expected.
        memory: of the device, in bytes; 0 where it is not known.
    """
    ordered = sorted(asked, reverse=True)
    return [batch for batch in ordered if not memory or batch * bytes_per_image <= memory] or ordered[-1:]


def compiled(function: Callable[..., Any], case: dict[str, Any]) -> Callable[..., Any]:
    """A function through torch.compile for shapes that do not change."""
    return torch.compile(function, dynamic=False, fullgraph=True, backend=case["compiler"])


def compile_blocks(model: ConvNeXtV2Encoder, case: dict[str, Any]) -> None:
    """Compile `masked_dense` for an encoder block by block: once a stage, and every downsampling layer.

    For good: what does this has its process for itself.
    """
    torch._dynamo.config.recompile_limit = 64
    masked_dense.masked_block = compiled(masked_dense.masked_block, case)
    for layer in model.downsample_layers:
        layer.compile(dynamic=False, fullgraph=True, backend=case["compiler"])


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype; nothing to do for float32."""
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")


def arguments(description: str, sizes: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the step benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", nargs="+", default=["base", "tiny", "huge"], choices=sizes, metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="the largest that fits is used")
    parser.add_argument("--image", type=int, default=224, help=f"pixels, a multiple of {STRIDE}")
    parser.add_argument("--ratio", type=float, default=0.6, help="mask ratio")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="by autocast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--repeat-seconds", type=float, default=3.0, help="about how long to repeat a step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop measuring after that long")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which a variant is given up")
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON)")
    return parser


HOW_CUDA = """
There is no backend "cuda" to ask for here: a whole model has operators without kernels in CUDA C++ (conv, layer_norm).
They take part by the table from which `auto` chooses on a GPU, the one that is shipped or that of --choices: where it
says that CUDA is faster for an operator at a shape, that is what runs. choices.py measures and writes such a table.
"""


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The option for another table than the one that is shipped."""
    parser.epilog = HOW_CUDA
    parser.add_argument("--choices", type=Path, metavar="FILE", help="table for `auto`, instead of the one shipped")


def parsed(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked."""
    options = parser.parse_args(given)
    if options.image < STRIDE or options.image % STRIDE:
        parser.error(f"--image is {options.image}: expected a multiple of {STRIDE}")
    if min(options.batch) < 1:
        parser.error(f"--batch is {options.batch}: expected 1 or more")
    try:
        visible_count((options.image // STRIDE) ** 2, options.ratio)
    except ValueError as error:
        parser.error(str(error))
    if getattr(options, "choices", None) is not None:
        try:
            choices._measurements = choices.read(options.choices)  # here, so in all processes that this one forks
        except ValueError as error:
            parser.error(f"--choices: {error}")
    options.deadline = time.monotonic() + options.seconds
    return options


def settings(options: argparse.Namespace, size: str) -> dict[str, Any]:
    """The case that the options ask for at a size."""
    return {
        "size": size,
        **{name: getattr(options, name) for name in ("image", "ratio", "dtype", "device", "compiler")},
    }


def installed(name: str) -> bool:
    """Whether a package can be imported; nothing of it is."""
    return importlib.util.find_spec(name) is not None


def dropping(*modules: torch.nn.Module) -> Callable[[], None]:
    """Sets the gradients of modules to None."""

    def drop() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)

    return drop
