"""Every kernel of the operators on a GPU: its time, and how much of what the machine can do that is.

    python benchmarks/kernels.py --out kernels.json
    python benchmarks/kernels.py --size tiny --stage 1 --programs block --backend cuda --out kernels.json

Operators run forward and backward at the stages of a model, on Triton and on CUDA. Every launch that they make is
recorded with its arguments, Triton's kernels, CUDA operators and torch's own alike, and then made again by itself, many
times, each time after reading a buffer that pushes everything else out of the L2 cache. A kernel's floor is

    max(bytes / copy bandwidth, matrix FLOPs / rate of matrix products, other FLOPs / rate of float32 FMAs)

with its least work after kernel_costs.py and the three rates measured in the same run. `fraction` is floor / time.

What else a case holds: `ms`, the whole program as training runs it, the device never waited for, forward and
backward; `queued_ms`, the same with everything launched before the device begins: without gaps, and with data still
in the cache; `sum_ms`, of the kernels by themselves; `gap_ms` = ms - queued_ms, what launching costs.

Program `dense_depthwise_conv` is what the depthwise convolution is compared with: torch's own on dense tensors in
channels_last, which cuDNN computes: forward, gradient of the input and gradient of the weight. Once at equal work, on
as many whole images as come closest to the number of visible rows, and once on all images of the batch, which is what a
dense network computes. `sites` says how many those are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import isolated
import kernel_costs
import steps
import torch
from isolated import Task
from kernel_costs import Cost
from record import Results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsecnx import Layout, SparseTensor, ops, random_mask, use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import STRIDE

CUDA_NAMESPACE = "sparsecnx_cuda"  # of the operators that are kernels themselves
BACKENDS = ("triton", "cuda")
DENSE = "dense_depthwise_conv"
STAGES = (1, 2, 3, 4)
PROGRAMS = (
    "depthwise_conv",
    "block",
    "layer_norm",
    "grn",
    "stochastic_depth",
    "gather",
    "scatter",
    "conv",
    "layout",
)
ON_CUDA = ("depthwise_conv", "block", "grn", "gather", "scatter", "layout")  # the others have no CUDA kernels
WARM_UP = 3
SECONDS = 0.12  # to repeat a kernel
LEAST_REPEATS, MOST_REPEATS = 10, 100
FLUSH_BYTES = 2**29
SLEEP_CYCLES = 5_000_000  # the device waits a few milliseconds while launches are queued

Rates = dict[str, float]
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that was recorded.

    Attributes:
        name: of the kernel, or of the operator: `torch.mm`, `cuda.grn`.
        call: makes it again.
        cost: its least work.
        text: its arguments in words.
        phase: `forward` or `backward`.
    """

    name: str
    call: Call
    cost: Cost
    text: str
    phase: str


class Recording(TorchDispatchMode):
    """Collects what an operator runs: launches of Triton kernels, CUDA operators, and torch's operators that compute
    something.

    Attributes:
        calls: in their order.
    """

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Launch] = []
        self._launching = False

    def __enter__(self) -> Recording:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        definition = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if definition is not None:
            # Written in Python: entered, so that what it calls in turn is seen.
            with self:
                return definition._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self._launching and not func.is_view and func._schema.name.split("::")[1] not in self.FREE:
            inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(out)
            if func.namespace == CUDA_NAMESPACE:
                name = func._schema.name.replace(f"{CUDA_NAMESPACE}::", "cuda.")
                found = kernel_costs.cuda_cost(func, args, kwargs, outputs)
            else:
                name = func._schema.name.replace("aten::", "torch.").replace("::", ".")
                found = kernel_costs.operator_cost(name, inputs, outputs)
            if found.bytes:
                self._add(name, functools.partial(func, *args, **kwargs), found, words(inputs))
        return out

    def _add(self, name: str, call: Call, cost: Cost, text: str) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        self.calls.append(Launch(name, call, cost, text, "backward" if in_backward else "forward"))

    def observe(self, kernel: Any, grid: triton_launch.Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """An observer for `triton_launch.observing`."""
        call = functools.partial(triton_launch.run, kernel, grid, *arguments, **options)
        self._launching = True  # what launching, tuning and counting run is no part of the operator
        try:
            call()
            found = kernel_costs.cost(kernel, arguments, options)
        finally:
            self._launching = False
        name, by_name = kernel_costs.bound(kernel, arguments, options)
        constants = {key: value for key, value in by_name.items() if key.isupper() and len(key) > 1}
        where = "" if callable(grid) else f"grid {grid}, "
        text = where + ", ".join([words(arguments), *(f"{key}={value}" for key, value in constants.items())])
        self._add(name, call, found, text)


def words(values: Sequence[Any]) -> str:
    """Shapes of tensors."""
    shapes = ("x".join(map(str, value.shape)) for value in values if isinstance(value, Tensor))
    return " ".join(shape or "scalar" for shape in shapes)


def record(run: Call) -> list[Launch]:
    """All that `run` launches."""
    recording = Recording()
    with triton_launch.observing(recording.observe), recording:
        run()
    return recording.calls


def queued(call: Call, device: torch.device, repeats: int, before: Call | None = None) -> list[float]:
    """Milliseconds of a call by itself, everything queued while the device waits."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for index, (start, end) in enumerate(events):
        if index % 10 == 0:
            torch.cuda._sleep(SLEEP_CYCLES)
        if before is not None:
            before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def repeated(call: Call, device: torch.device, before: Call | None, seconds: float = SECONDS) -> list[float]:
    """As `queued`, as often as fits into some seconds, after warm-up."""
    for _ in range(WARM_UP):
        call()
    once = min(queued(call, device, 2, before))
    repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(1e3 * seconds / max(once, 1e-3))))
    if device.type != "cuda":
        repeats = 2
    return queued(call, device, repeats, before)


def flusher(device: torch.device) -> Call:
    """Something that leaves none of a kernel's data in the L2 cache, and nothing that has to be written back."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
    return functools.partial(torch.sum, buffer)


def measure_rates(device_name: str, dtype_name: str) -> Rates:
    """Bytes and FLOPs per second that the device reaches, and how long a kernel takes that does nothing, in ms."""
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    large = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.rand(2**28 if large else 2**20, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(repeated(functools.partial(target.copy_, source), device, None))
    side = 8192 if large else 128
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    product = statistics.median(repeated(lambda: torch.mm(a, b, out=out), device, None, seconds=0.5))
    one = torch.zeros(1, device=device)
    return {
        "copy_bytes_per_s": 1e3 * 2 * (2**28 if large else 2**20) * 4 / copy,
        "matrix_flops_per_s": 1e3 * 2 * side**3 / product,
        "vector_flops_per_s": fma_rate(device),
        "empty_ms": statistics.median(repeated(one.zero_, device, None)),
    }


def fma_rate(device: torch.device) -> float:
    """FLOPs per second of float32 multiply-adds in registers."""
    import fma_kernel

    programs = 16 * triton_launch.processors(device) if device.type == "cuda" else 1
    iterations = 4096 if device.type == "cuda" else 1
    out = torch.empty(programs * fma_kernel.BLOCK, device=device)
    if device.type != "cuda" and not triton_launch.interpreting:
        return math.inf
    call = functools.partial(fma_kernel.run, out, programs, iterations)
    return 1e3 * fma_kernel.flops(programs, iterations) / statistics.median(repeated(call, device, None))


def floor(cost: Cost, rates: Rates) -> tuple[float, str]:
    """Milliseconds below which no kernel gets, and what keeps it there: `bytes`, `matrix` or `vector`."""
    bounds = {
        "bytes": cost.bytes / rates["copy_bytes_per_s"],
        "matrix": cost.matrix / rates["matrix_flops_per_s"],
        "vector": cost.vector / rates["vector_flops_per_s"],
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return 1e3 * bounds[bound], bound


def programs(case: dict[str, Any], batch: int) -> dict[str, Callable[[], Call]]:
    """What makes each program of a stage: operators forward and backward on random data."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    channels, tile = case["channels"], case["tile"]
    side = case["image"] // STRIDE
    visible = visible_count(side * side, case["ratio"])
    mask = random_mask(batch, (side, side), case["ratio"], generator=torch.Generator().manual_seed(0))
    mask = mask.view(batch, side, side).to(device)
    layout = Layout.from_mask(mask, (side * tile, side * tile), visible)
    hidden = 4 * channels

    def leaf(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, dtype=dtype)).requires_grad_()

    def vector(size: int = channels) -> Tensor:
        return leaf(size, dtype=torch.float32)

    def rows(width: int = channels) -> SparseTensor:
        return SparseTensor(leaf(layout.rows, width), layout)

    def program(forward: Callable[[], Tensor], *leaves: Tensor) -> Call:
        grad = torch.randn_like(forward())

        def run() -> None:
            torch.autograd.grad(forward(), leaves, grad)

        return run

    def block() -> Call:
        x = rows()
        p = ops.BlockParameters(
            leaf(channels, 1, 7, 7, scale=1 / 7),
            vector(),
            vector(),
            vector(),
            leaf(hidden, channels, scale=channels**-0.5),
            vector(hidden),
            vector(hidden),
            vector(hidden),
            leaf(channels, hidden, scale=hidden**-0.5),
            vector(),
        )
        return program(lambda: ops.convnextv2_block(x, p).features, x.features, *p)

    def depthwise_conv() -> Call:
        x, weight, bias = rows(), leaf(channels, 1, 7, 7, scale=1 / 7), vector()
        return program(lambda: ops.depthwise_conv(x, weight, bias).features, x.features, weight, bias)

    def layer_norm() -> Call:
        x, weight, bias = rows(), vector(), vector()
        return program(lambda: ops.layer_norm(x, weight, bias).features, x.features, weight, bias)

    def grn() -> Call:
        x, gamma, beta = rows(hidden), vector(hidden), vector(hidden)
        return program(lambda: ops.grn(x, gamma, beta).features, x.features, gamma, beta)

    def stochastic_depth() -> Call:
        x = rows()
        return program(lambda: ops.stochastic_depth(x, 0.5).features, x.features)

    def gather() -> Call:
        # In front of the first stage come the images, at pixel size.
        shape = (3, case["image"], case["image"]) if case["stage"] == 1 else (channels, side * tile, side * tile)
        dense = leaf(batch, *shape)
        return program(lambda: SparseTensor.from_dense(dense, mask, visible).features, dense)

    def scatter() -> Call:
        x, fill = rows(), leaf(channels)
        return program(lambda: x.dense(fill), x.features, fill)

    def conv() -> Call:
        x, weight, bias = rows(), leaf(channels, channels, 3, 3, scale=(9 * channels) ** -0.5), vector()
        return program(lambda: ops.conv(x, weight, bias).features, x.features, weight, bias)

    def layout_tables() -> Call:
        def run() -> None:
            built = Layout.from_mask(mask, (side * tile, side * tile), visible)
            built.tiles.slots()
            for radius in (1, 2, 3):
                built.tiles.neighbours(radius)

        return run

    makers = (depthwise_conv, block, layer_norm, grn, stochastic_depth, gather, scatter, conv, layout_tables)
    return dict(zip(PROGRAMS, makers, strict=True))


def dense_depthwise_conv(case: dict[str, Any], images: int) -> list[Launch]:
    """torch's own depthwise convolution of the stage on whole images, and its gradients, each by itself."""
    device, dtype, channels = torch.device(case["device"]), getattr(torch, case["dtype"]), case["channels"]
    side = case["image"] // STRIDE * case["tile"]
    torch.backends.cudnn.benchmark = True
    x, grad = (
        torch.randn(images, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(channels, 1, 7, 7, device=device, dtype=dtype) / 7
    bias = torch.randn(channels, device=device, dtype=dtype)
    geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], channels)  # stride, padding, dilation, transposed, ..., groups
    flops = kernel_costs.dense_depthwise_conv(images, channels, (side, side), (7, 7))
    operators = torch.ops.aten
    found = [
        Launch(
            "torch.depthwise_conv",
            functools.partial(operators.convolution.default, x, weight, bias, *geometry),
            Cost(kernel_costs.size(x, weight, bias, x), vector=flops),
            words((x, weight, bias)),
            "forward",
        )
    ]
    for name, wanted in (("input_grad", x), ("weight_grad", weight)):
        mask = [wanted is x, wanted is weight, False]
        backward = operators.convolution_backward.default
        found.append(
            Launch(
                f"torch.depthwise_conv_{name}",
                functools.partial(backward, grad, x, weight, [channels], *geometry, mask),
                # The operand that a gradient does not depend on is not read: the gradient is as large as the other.
                Cost(kernel_costs.size(x, grad, weight), vector=flops),
                words((grad, x, weight)),
                "backward",
            )
        )
    return found


def measure_dense(case: dict[str, Any], batch: int, device: torch.device, rates: Rates) -> Iterator[dict[str, Any]]:
    """The cases of program `dense_depthwise_conv`."""
    side = case["image"] // STRIDE
    sites = (side * case["tile"]) ** 2
    rows = batch * visible_count(side * side, case["ratio"]) * case["tile"] ** 2
    for name, images in (("equal sites", max(1, round(rows / sites))), ("whole batch", batch)):
        calls = dense_depthwise_conv(case, images)
        run = functools.partial(run_all, calls)
        yield {"sites": images * sites, "rows": rows, "images": name, **measure_program(run, device, rates, calls)}
        del calls, run


def run_all(calls: Sequence[Launch]) -> None:
    for launch in calls:
        launch.call()


def measure_program(
    run: Call, device: torch.device, rates: Rates, calls: Sequence[Launch] | None = None
) -> dict[str, Any]:
    """Times of a program, and of every kernel in it: of `calls` where they are known, otherwise they are recorded."""
    begin = time.perf_counter()
    run()
    steps.synchronize(device)
    result: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 2)}
    run()
    calls = record(run) if calls is None else calls
    (once,) = steps.timed(run, lambda: None, device, 1)
    repeats = max(5, min(30, int(500 / max(once, 1e-3)))) if device.type == "cuda" else 1
    result["ms"] = round(statistics.median(steps.timed(run, lambda: None, device, repeats)), 4)
    result["queued_ms"] = round(statistics.median(queued(run, device, repeats, functools.partial(sleep, device))), 4)
    flush = flusher(device)
    kernels = list(measured_kernels(calls, device, rates, flush))
    total = sum(kernel["ms"] * kernel["launches"] for kernel in kernels)
    for kernel in kernels:
        kernel["share"] = round(kernel["ms"] * kernel["launches"] / total, 4) if total else 0.0
    kernels.sort(key=lambda kernel: kernel["share"], reverse=True)
    gap = result["ms"] - result["queued_ms"]
    return {**result, "sum_ms": round(total, 4), "gap_ms": round(gap, 4), "kernels": kernels}


def sleep(device: torch.device) -> None:
    """Keep a GPU waiting until a whole program is queued."""
    if device.type == "cuda":
        torch.cuda._sleep(4 * SLEEP_CYCLES)


def measured_kernels(
    calls: Sequence[Launch], device: torch.device, rates: Rates, flush: Call
) -> Iterator[dict[str, Any]]:
    """Every kernel with its time and floor; launches alike in everything are measured once."""
    alike: dict[tuple[str, Cost, str, str], list[Call]] = {}
    for launch in calls:
        alike.setdefault((launch.name, launch.cost, launch.text, launch.phase), []).append(launch.call)
    for (name, cost, text, phase), launches in alike.items():
        times = repeated(launches[0], device, flush)
        milliseconds = statistics.median(times)
        least, by = floor(cost, rates)
        yield {
            "name": name,
            "phase": phase,
            "launches": len(launches),
            "ms": round(milliseconds, 5),
            "min_ms": round(min(times), 5),
            "bytes": cost.bytes,
            "matrix_flops": cost.matrix,
            "vector_flops": cost.vector,
            "floor_ms": round(least, 5),
            "bound": by,
            "fraction": round(least / milliseconds, 4) if milliseconds else 0.0,
            "launch": text,
        }


def measure_stage(
    case: dict[str, Any],
    names: Sequence[str],
    backends: Sequence[str],
    batches: Sequence[int],
    rates: Rates,
    path: Any,
    run: str,
) -> dict[str, str]:
    """Measure programs of a stage on every backend at the largest batch that fits, and write each to the results file.

    Returns:
        By program and backend what went wrong, where something did.
    """
    device = torch.device(case["device"])
    problems = {}
    for name in names:
        for backend in offered(name, backends):
            label = f"{name} on {backend}"
            for batch in batches:
                torch.manual_seed(0)
                try:
                    if name == DENSE:
                        found = list(measure_dense(case, batch, device, rates))
                    else:
                        with use_backend("reference" if backend == "torch" else backend):
                            found = [measure_program(programs(case, batch)[name](), device, rates)]
                except Exception as error:
                    problems[label] = isolated.reason(error)
                    if "out of memory" not in str(error):
                        break
                    continue
                finally:
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                problems.pop(label, None)
                for result in found:
                    parts = [f"{case['size']}-stage{case['stage']}-{name}", f"batch{batch}", case["dtype"]]
                    parts += [case["device"], backend, *result.get("images", "").split()]
                    content = {**case, "batch": batch, "program": name, "backend": backend, "rates": rates, **result}
                    Results(path, run).add("-".join(parts), content)
                break
    return problems


def offered(name: str, backends: Sequence[str]) -> list[str]:
    """The backends to measure a program on: those asked for that have kernels of their own for it, or torch."""
    if name == DENSE:
        return ["torch"]
    if name == "layout":
        return [*(["torch"] if "triton" in backends else []), *(["cuda"] if "cuda" in backends else [])]
    return [backend for backend in backends if backend != "cuda" or name in ON_CUDA]


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The stages asked for."""
    for size in options.size:
        for stage in options.stage:
            yield {
                "size": size,
                "stage": stage,
                "channels": (options.dims or SIZES[size].dims)[stage - 1],
                "tile": 2 ** (4 - stage),
                "image": options.image,
                "ratio": options.ratio,
                "dtype": options.dtype,
                "device": options.device,
            }


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = steps.arguments("Time every kernel of the operators.", list(SIZES))
    parser.add_argument("--stage", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    parser.add_argument("--dims", nargs=4, type=int, metavar="C", help="channels of the stages, instead of a size's")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    help = "by default all at the first size, the first three at the others"
    parser.add_argument("--programs", nargs="+", choices=(DENSE, *PROGRAMS), help=help)
    return steps.parsed(parser, given)


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    run = Results(options.out).run
    (outcome,) = isolated.outcomes([Task("rates", measure_rates, (options.device, options.dtype), options.limit)])
    if outcome.status != "done":
        print(f"rates: {outcome.status}: {isolated.last_line(outcome.error)}", file=sys.stderr)
        return 1
    rates = outcome.value
    print("  " + ", ".join(f"{name} {value:.4g}" for name, value in rates.items()), file=sys.stderr, flush=True)
    batches, tasks = sorted(options.batch, reverse=True), []
    first = (DENSE, "depthwise_conv", "block")  # everywhere: what a network runs, and what it is compared with
    for names in (first, [name for name in PROGRAMS if name not in first]):
        for case in cases(options):
            wanted = options.programs or (PROGRAMS if case["size"] == options.size[0] else ())
            chosen = [name for name in names if name in (options.programs or (*first, *wanted))]
            if case["stage"] != min(options.stage) and "layout" in chosen:
                chosen.remove("layout")  # the same tables serve all stages
            if chosen:
                name = f"{case['size']} stage {case['stage']}: {', '.join(chosen)}"
                arguments = (case, chosen, options.backend, batches, rates, options.out, run)
                tasks.append(Task(name, measure_stage, arguments, options.limit))
    failed = False
    for outcome in isolated.outcomes(tasks, deadline=options.deadline):
        problems = outcome.value if outcome.status == "done" else {outcome.status: isolated.last_line(outcome.error)}
        failed |= bool(problems)
        text = "; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "done"
        print(f"  {outcome.task.name}: {text} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
