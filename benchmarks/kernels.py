"""Time every GPU kernel of the operators, and say how close each comes to what the machine can do.

    python benchmarks/kernels.py --size tiny --out kernels.json
    python benchmarks/kernels.py --size tiny --stage 1 --programs depthwise_conv block --backend cuda

Operators run forward and backward at the stages of a model, on Triton and, where they have kernels in it, on CUDA C++.
Every launch is recorded with its arguments, torch's own operators too. It is then repeated alone, launched while the
device still sleeps, with its data pushed out of the L2 cache. A kernel's floor is

    max(bytes / copy bandwidth, matrix FLOPs / rate of matrix products, other FLOPs / rate of float32 multiply-adds)

Bytes are those of its tensors, each read or written once; of a gather only what is gathered. Matrix FLOPs are those of
products with the rows. Of the other FLOPs only those of the depthwise convolution count, for taps on visible sites; all
else is short beside its bytes. `measure.rates` says where the rates come from. `fraction` is floor / time.

Program `dense_depthwise_conv` is torch's own depthwise convolution on the whole batch in channels_last, which is what a
dense network computes. Without a GPU, `--device cpu` under TRITON_INTERPRET=1 shows at toy sizes that all of this runs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import measure
import torch
from measure import Call, Case, Results, say
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sparsecnx import Layout, SparseTensor, ops, use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import BackendError
from sparsecnx.models import SIZES

DENSE = "dense_depthwise_conv"
REPEATS = 20
FLUSH_BYTES = 2**29
SLEEP_CYCLES = 20_000_000  # the device waits about ten milliseconds while launches are queued


class Work(NamedTuple):
    """The least work of a kernel or a torch operator.

    Attributes:
        name: name of the kernel or the operator.
        phase: `forward` or `backward`.
        shapes: shapes of its tensors.
        bytes, matrix, vector: least bytes moved, FLOPs of matrix products, other FLOPs.
    """

    name: str
    phase: str
    shapes: str
    bytes: int
    matrix: int
    vector: int


class Stage:
    """The place in a network where the operators run: channels, tiles and a mask."""

    def __init__(self, case: Case, stage: int) -> None:
        self.case, self.stage = case, stage
        self.device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        self.channels = SIZES[case.size].dims[stage - 1]
        self.hidden = 4 * self.channels
        self.mask = case.mask()
        side = case.grid[0] * 2 ** (4 - stage)
        self.layout = Layout.from_mask(self.mask, (side, side), case.visible)

    @functools.cached_property
    def taps(self) -> int:
        """Number of pairs of a visible site and a tap of a 7x7 kernel on a visible site, by a convolution of ones."""
        ones = SparseTensor(torch.ones(self.layout.rows, 1, device=self.device), self.layout)
        return int(ops.depthwise_conv(ones, torch.ones(1, 1, 7, 7, device=self.device)).features.double().sum())

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return random values that ask for a gradient, small enough for products to stay finite."""
        drawn = torch.randn(shape, device=self.device) / shape[-1] ** 0.5
        return drawn.to(dtype or self.dtype).requires_grad_()

    def vector(self, size: int | None = None) -> Tensor:
        return self.leaf(size or self.channels, dtype=torch.float32)

    def rows(self, width: int | None = None) -> SparseTensor:
        return SparseTensor(self.leaf(self.layout.rows, width or self.channels), self.layout)

    def image(self, channels: int, side: int) -> Tensor:
        return self.leaf(self.case.batch, channels, side, side)

    def program(self, name: str) -> Call:
        """Return one of `PROGRAMS`, forward and backward."""
        forward, *leaves = PROGRAMS[name](self)
        inputs = [leaf.features if isinstance(leaf, SparseTensor) else leaf for leaf in leaves]
        grads: list[Tensor] = []

        def run() -> None:
            out = forward(*leaves)
            out = out.features if isinstance(out, SparseTensor) else out
            if not grads:
                grads.append(torch.randn_like(out))
            torch.autograd.grad(out, inputs, grads[0])

        return run


def block(s: Stage) -> tuple[Any, ...]:
    first = [s.leaf(s.channels, 1, 7, 7), s.vector(), s.vector(), s.vector(), s.leaf(s.hidden, s.channels)]
    second = [s.vector(s.hidden), s.vector(s.hidden), s.vector(s.hidden), s.leaf(s.channels, s.hidden), s.vector()]
    return lambda x, *parameters: ops.convnextv2_block(x, ops.BlockParameters(*parameters)), s.rows(), *first, *second


def gather(s: Stage) -> tuple[Any, ...]:
    # The first stage gathers images, at pixel size.
    images = s.image(3, s.case.image) if s.stage == 1 else s.image(s.channels, s.layout.shape[0])
    return lambda x: SparseTensor.from_dense(x, s.mask, s.case.visible), images


def dense(s: Stage) -> tuple[Any, ...]:
    torch.backends.cudnn.benchmark = True
    x = s.image(s.channels, s.layout.shape[0]).detach().to(memory_format=torch.channels_last).requires_grad_()
    convolve = functools.partial(torch.nn.functional.conv2d, padding=3, groups=s.channels)
    return convolve, x, s.leaf(s.channels, 1, 7, 7), s.leaf(s.channels)


# Each returns an operator and its arguments, which all ask for gradients.
PROGRAMS: dict[str, Callable[[Stage], tuple[Any, ...]]] = {
    DENSE: dense,
    "depthwise_conv": lambda s: (ops.depthwise_conv, s.rows(), s.leaf(s.channels, 1, 7, 7), s.vector()),
    "block": block,
    "layer_norm": lambda s: (ops.layer_norm, s.rows(), s.vector(), s.vector()),
    "grn": lambda s: (ops.grn, s.rows(s.hidden), s.vector(s.hidden), s.vector(s.hidden)),
    "stochastic_depth": lambda s: (lambda x: ops.stochastic_depth(x, 0.5), s.rows()),
    "gather": gather,
    "scatter": lambda s: (lambda x, fill: x.dense(fill), s.rows(), s.leaf(s.channels)),
    "conv": lambda s: (ops.conv, s.rows(), s.leaf(s.channels, s.channels, 3, 3), s.vector()),
}
ON_CUDA = ("depthwise_conv", "block")  # programs with kernels in CUDA C++


class Recorder(TorchDispatchMode):
    """Collects what a program runs: launches of Triton kernels, CUDA operators, and torch's own operators.

    Attributes:
        launches: calls that repeat them, by their work.
    """

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.taps = stage.taps  # computed before anything is recorded
        self.launches: dict[Work, list[Call]] = {}
        self._launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sparsecnx_triton":
            # It is written in Python. Its kernel for the device runs in this mode, which so sees what it calls in turn.
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self.stage.device.type.upper()))
            with self:
                return func.redispatch(keys, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name
        if not self._launching and not func.is_view and name.partition("::")[2] not in self.FREE:
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            call = functools.partial(func, *args, **kwargs)
            self._add(name, call, tree_leaves((args, kwargs, out)), 0 if "conv" in name else flops)
        return out

    def observe(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """Run and record a launch: an observer for `triton_launch.observing`."""
        call = functools.partial(triton_launch.run, kernel, grid, **arguments)
        self._launching = True  # what launching and tuning run is no part of the operator
        try:
            call()
        finally:
            self._launching = False
        while not hasattr(kernel, "__name__"):
            kernel = kernel.fn
        rows, c = self.stage.layout.rows, self.stage.channels
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        # A kernel that gets rows and a matrix of the block multiplies them.
        has_rows = any(tensor.numel() >= rows * c and tensor.is_floating_point() for tensor in tensors)
        matrices = sum(tensor.numel() for tensor in tensors if sorted(tensor.shape) == [c, 4 * c])
        self._add(kernel.__name__, call, tensors, 2 * rows * matrices if has_rows else 0)

    def _add(self, name: str, call: Call, values: Sequence[Any], matrix: int) -> None:
        tensors = {id(value): value for value in values if isinstance(value, Tensor)}.values()
        sizes = sorted(tensor.numel() * tensor.element_size() for tensor in tensors)
        if not sizes:
            return
        if "gather" in name and len(sizes) > 1:
            sizes[-1] = sizes[-2]  # of what is gathered from, only as much is read as is written
        vector = 2 * self.taps * self.stage.channels if "depthwise" in name else 0
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        shapes = " ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)
        self.launches.setdefault(Work(name, phase, shapes, sum(sizes), matrix, vector), []).append(call)


def alone_ms(call: Call, device: torch.device, flush: Call) -> float:
    """Return the median time of a launch by itself, with its data out of the cache."""
    if device.type != "cuda":
        return measure.milliseconds(call, device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    call()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SLEEP_CYCLES)
    for start, end in events:
        flush()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure_program(run: Call, stage: Stage, rates: dict[str, float], repeats: int) -> dict[str, Any]:
    """Return the time of a whole program, and of each of its kernels the time, the floor, and their ratio."""
    run()  # compiles and tunes
    recorder, device = Recorder(stage), stage.device
    with triton_launch.observing(recorder.observe), recorder:
        run()
    buffer = torch.zeros(FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)
    kernels = []
    for work, calls in recorder.launches.items():
        ms = alone_ms(calls[0], device, buffer.sum)
        floors = {bound: 1e3 * getattr(work, bound) / rate for bound, rate in rates.items()}
        bound = max(floors, key=lambda name: floors[name])
        times = {"ms": round(ms, 5), "floor_ms": round(floors[bound], 5), "fraction": round(floors[bound] / ms, 4)}
        kernels.append({**work._asdict(), "launches": len(calls), "bound": bound, **times})
    kernels.sort(key=lambda kernel: kernel["ms"] * kernel["launches"], reverse=True)
    return {"ms": measure.interleaved({"run": run}, repeats, device)["run"], "kernels": kernels}


def measured(options: argparse.Namespace, rates: dict[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every program that was asked for, by stage and backend, with its results."""
    for case, number in itertools.product(measure.cases(options), options.stage):
        stage = Stage(case, number)
        for name, backend in itertools.product(options.programs, ("torch", *options.backend)):
            if (name == DENSE) != (backend == "torch") or (backend == "cuda" and name not in ON_CUDA):
                continue
            key = f"{case.key}-stage{number}-{name}-{backend}"
            say(key)
            facts = {"size": case.size, "stage": number, "program": name, "backend": backend, "rates_per_s": rates}
            try:
                with use_backend("auto" if backend == "torch" else backend):
                    found = measure_program(stage.program(name), stage, rates, options.repeats)
            except (BackendError, torch.OutOfMemoryError) as error:
                found = {"error": str(error)}
                say(f"  not timed: {error}")
            yield key, {**facts, "rows": stage.layout.rows, "channels": stage.channels, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.set_defaults(size=["tiny"], device="cuda", dtype="bfloat16", batch=[64])
    parser.add_argument("--stage", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    options = measure.parse(parser, arguments)
    rates = measure.rates(torch.device(options.device), getattr(torch, options.dtype))
    say(", ".join(f"{name} {value:.4g} per second" for name, value in rates.items()))
    results, rows, failed = Results(options.out), [], False
    for key, case in measured(options, rates):
        failed |= "error" in case
        results.add(key, case)
        for kernel in case.get("kernels", ()):
            where = f"{case['size']} stage {case['stage']} {case['program']} on {case['backend']}"
            facts = [kernel[name] for name in ("phase", "name", "launches", "ms", "floor_ms", "bound", "fraction")]
            rows.append([where, *facts])
    measure.print_table(["program", "pass", "kernel", "launches", "ms", "floor, ms", "bound", "fraction"], rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
