"""How busy a small model keeps a GPU: the encoder's forward + backward, launched eagerly and as a CUDA graph.

    python benchmarks/launch_overhead.py --out overhead.json

By default Atto at batch 64 in bfloat16, whose kernels are so short that launching them is what takes time. Every step
has another mask, copied into the same buffer: pixels are gathered and neighbour tables built anew, in the graph too.

    ms         a step, the device never waited for
    kernel_ms  the part of it in which at least one kernel or copy runs, by torch.profiler in a run of its own
    queued_ms  a step that was launched whole before the device began: its kernels and what lies between them even then.
               Of the eager mode; it also says something where the profiler sees no kernels
    busy       kernel_ms / ms; queued_ms / ms, with `busy_by` saying so, where there is no kernel_ms

The graph's output and gradients are compared with the eager step's under a mask that it was not captured with.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import encoder_step
import isolated
import kernels
import measure
import steps
import torch
from isolated import Task
from record import Results
from steps import Step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sparsecnx import random_mask
from sparsecnx.models import SIZES

MASKS = 8
PROFILED = 5  # steps
GOAL = 0.9
CYCLES_PER_MS = 2_000_000  # of the device, about
MOST_SLEEP_MS = 200.0

Call = Callable[[], object]


def measure_case(case: dict[str, Any], batch: int, seconds: float) -> dict[str, Any]:
    """Both modes of a case; on the CPU, which has no graphs, the eager one."""
    device = torch.device(case["device"])
    step = encoder_step.sparse(case, True, batch)
    _, mask, *_ = step.inputs
    renew = renewal(mask, case["ratio"])

    def reset() -> None:
        step.reset()
        renew()

    steps.measured(step, device, graph=False, seconds=0.0)  # compiles, tunes, warms up
    found = {"eager": mode(step.run, reset, device, seconds)}
    if device.type == "cuda":
        queued = queued_ms(step.run, reset, device, found["eager"]["ms"]["median"])
        found["eager"] |= {"queued_ms": round(queued, 4)}
        step.reset()
        replay, _ = steps.captured(step, device)
        found["graph"] = mode(replay, renew, device, seconds)
        found["graph"] |= check(step, replay, renew)
    for modes in found.values():
        modes.update(busy(modes))
    return found


def renewal(mask: torch.Tensor, ratio: float) -> Call:
    """Copies another random mask into `mask` every time it is called."""
    batch, *grid = mask.shape
    generator = torch.Generator().manual_seed(1)
    drawn = [random_mask(batch, tuple(grid), ratio, generator=generator).view_as(mask) for _ in range(MASKS)]
    masks = itertools.cycle([one.to(mask.device) for one in drawn])
    return lambda: mask.copy_(next(masks))


def check(step: Step, replay: Call, renew: Call) -> dict[str, Any]:
    """Errors of the graph against the eager step under a new mask."""
    renew()
    replay()
    return step.check()


def mode(run: Call, reset: Call, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time of a step, and of what the device does in it."""
    reset()
    run()
    (once,) = steps.timed(run, reset, device, 1)
    repeats = max(steps.LEAST_REPEATS, min(10 * steps.MOST_REPEATS, int(1e3 * seconds / max(once, 1e-3))))
    found: dict[str, Any] = {"ms": measure.spread(steps.timed(run, reset, device, repeats))}
    return {**found, **profiled(run, reset, device)}


def profiled(run: Call, reset: Call, device: torch.device) -> dict[str, Any]:
    """`kernel_ms` and `launches` of a step; nothing where the profiler sees no kernels."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            reset()
            run()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    if not spans:
        return {}
    return {"kernel_ms": round(covered(spans) / 1e3 / PROFILED, 4), "launches": round(len(spans) / PROFILED, 1)}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def queued_ms(run: Call, reset: Call, device: torch.device, ms: float) -> float:
    """Milliseconds of a step that is launched while the device still sleeps."""
    times = []
    cycles = int(CYCLES_PER_MS * min(MOST_SLEEP_MS, 4 * ms + 2))
    for _ in range(PROFILED):
        reset()
        times += kernels.queued(run, device, 1, functools.partial(torch.cuda._sleep, cycles))
    return statistics.median(times)


def busy(found: dict[str, Any]) -> dict[str, Any]:
    """The fraction of a step's time in which the device works."""
    for name in ("kernel_ms", "queued_ms"):
        if name in found:
            fraction = round(found[name] / found["ms"]["median"], 4)
            return {"busy": fraction, "busy_by": name, "meets_goal": fraction > GOAL}
    return {}


def main(given: Sequence[str] | None = None) -> int:
    parser = steps.arguments("Busy fraction of the encoder's forward + backward.", list(SIZES))
    steps.add_choices(parser)
    parser.set_defaults(size=["atto"], batch=[64])
    options = steps.parsed(parser, given)
    run, failed = Results(options.out).run, False
    for size in options.size:
        case, batch = steps.settings(options, size), options.batch[0]
        task = Task(f"{size} batch {batch}", _measure, (case, batch, options.repeat_seconds, options.out, run))
        (outcome,) = isolated.outcomes([task], deadline=options.deadline)
        if outcome.status != "done":
            failed = True
            print(f"  {task.name}: {outcome.status}: {isolated.last_line(outcome.error)}", file=sys.stderr)
            continue
        for name, found in outcome.value.items():
            failed |= found.get("agrees") is False
            share = f"busy {found['busy']:.1%} by {found['busy_by']}" if "busy" in found else "no GPU to be busy"
            wrong = f", WRONG: {found['errors']}" if found.get("agrees") is False else ""
            print(f"  {task.name}, {name}: {found['ms']['median']:.3f} ms, {share}{wrong}", file=sys.stderr)
    return int(failed)


def _measure(case: dict[str, Any], batch: int, seconds: float, path: Any, run: str) -> dict[str, Any]:
    """Measure a case and add it to the results file. In a process of its own."""
    found = measure_case(case, batch, seconds)
    key = f"{case['size']}-mask{case['ratio']:g}-batch{batch}-{case['image']}px-{case['dtype']}-{case['device']}"
    Results(path, run).add(key, {**case, "batch": batch, "goal": GOAL, "modes": found})
    return found


if __name__ == "__main__":
    sys.exit(main())
