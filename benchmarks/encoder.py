"""The masked encoder, sparse against dense: the same weights, images and mask, in one process, in turn.

    python benchmarks/encoder.py --out benchmarks/results/encoder-cpu.json
    python benchmarks/encoder.py --sweep all --out benchmarks/results/encoder-cpu.json --plot benchmarks/results

Four variants:

    sparse     the sparse encoder, from images and mask: gathering pixels and neighbour tables are timed too
    dense      all operators on the whole image, times the mask (`sparsecnx.models.masked_dense`), eager
    compiled   the same through torch.compile
    floor      no encoder, only the matrix products of its blocks at the visible rows through torch.mm into
               buffers made before: two a block, with backward six

Images, and the weights of the dense encoder, are channels_last. Before anything is timed, outputs and all
parameter gradients of the variants are held against the dense encoder in float32. Forward alone is timed
without gradients, forward + backward with those of all parameters, which start out as None.

Memory, for each encoder: `saved_bytes` is what autograd keeps for backward, without parameters and images;
`peak_bytes` is the peak of forward + backward, gradients and all that kernels allocate included, over what a
process of its own held with weights and images alone; for the compiled encoder, over what it held after its
first steps, since compiling needs more than running (see measure.py).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import report
import torch
from record import Results
from torch import Tensor

from sparsecnx import SparseTensor, random_mask
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES, ConvNeXtV2Encoder, masked_dense
from sparsecnx.models.convnextv2 import STRIDE
from sparsecnx.ops.block import operator as block_operator

ENCODERS = ("sparse", "dense", "compiled")
SWEEPS: dict[str, tuple[Any, ...]] = {
    "size": ("atto", "pico", "tiny"),
    "ratio": (0.0, 0.25, 0.5, 0.6, 0.75, 0.9),
    "batch": (1, 2, 4, 8, 16),
    "image": (160, 224, 320),
}
# Largest ||got - expected|| / ||expected|| of the output and of every gradient, expected being the eager dense
# encoder in float32. In bfloat16 that one's own gradients are off by 2e-2 at Atto.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class Mismatch(Exception):
    """Two encoders that should compute the same do not."""


@dataclass(frozen=True)
class Case:
    """One setting. `ratio` comes last: cases that differ in it alone share weights and compiled code."""

    dtype: str
    device: str
    threads: int
    size: str
    batch: int
    image: int
    ratio: float

    @property
    def key(self) -> str:
        return (
            f"{self.size}-mask{self.ratio:g}-batch{self.batch}-{self.image}px"
            f"-{self.dtype}-{self.device}-{self.threads}threads"
        )

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image // STRIDE, self.image // STRIDE)

    @property
    def visible(self) -> int:
        return visible_count(self.grid[0] * self.grid[1], self.ratio)


class Workload:
    """Weights and images of a case, and the same encoding of them in several ways.

    Args:
        case: its ratio is the one to start with.
        encoders: of `ENCODERS`, those to offer.
    """

    def __init__(self, case: Case, encoders: Sequence[str] = ENCODERS) -> None:
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        torch.compiler.reset()
        size = SIZES[case.size]
        self.device = torch.device(case.device)
        model = ConvNeXtV2Encoder(size.depths, size.dims)
        randomize(model)
        self.sparse_model = model.to(self.device)
        self.dense_model = copy.deepcopy(self.sparse_model).to(memory_format=torch.channels_last)
        self.models = {name: self.sparse_model if name == "sparse" else self.dense_model for name in encoders}
        compiled = torch.compile(dense_encoder, dynamic=False, fullgraph=True)
        self.dense_functions = {"dense": dense_encoder, "compiled": compiled}
        images = torch.randn(case.batch, 3, case.image, case.image, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.output_grad = torch.randn(case.batch, size.dims[-1], *case.grid, device=self.device)
        self.set_ratio(case)

    def set_ratio(self, case: Case) -> None:
        """Another mask ratio: all else as it was."""
        self.case = case
        # Drawn on the CPU: the same mask on every device.
        mask = random_mask(case.batch, case.grid, case.ratio, generator=torch.Generator().manual_seed(0))
        self.mask = mask.view(-1, *case.grid).to(self.device)
        dense_grad = self.output_grad.to(memory_format=torch.channels_last)
        sparse_grad = SparseTensor.from_dense(dense_grad, self.mask, case.visible).features
        self.grads = {name: sparse_grad if name == "sparse" else dense_grad for name in self.models}
        self.products = block_products(self.sparse_model, case)

    def encode(self, name: str) -> Tensor:
        """The last stage's output: `(rows, C)` by the sparse encoder, else `(B, C, h, w)`."""
        dtype = getattr(torch, self.case.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if name == "sparse":
                return self.sparse_model(self.images, self.mask, self.case.visible).features
            return self.dense_functions[name](self.dense_model, self.images, self.mask)

    def forward(self, name: str) -> None:
        """One forward pass, keeping nothing for backward."""
        with torch.no_grad():
            self.encode(name)

    def forward_backward(self, name: str) -> None:
        """One forward and one backward pass, to the gradients of all parameters."""
        out = self.encode(name)
        out.backward(self.grads[name].to(out.dtype))

    def floor(self, backward: bool) -> None:
        """The matrix products of all blocks: of forward, or of forward and backward."""
        with torch.no_grad():
            for products in self.products:
                for a, b, out in products[: 6 if backward else 2]:
                    torch.mm(a, b, out=out)

    def drop_grads(self) -> None:
        """Set all gradients to None."""
        for model in (self.sparse_model, self.dense_model):
            model.zero_grad(set_to_none=True)

    def check(self) -> dict[str, dict[str, Any]]:
        """Relative errors of every encoder against the dense one in float32.

        Returns:
            By encoder: `output`, `gradient` (the largest), `parameter` (whose gradient that is).

        Raises:
            Mismatch: one is above `TOLERANCE`.
        """
        self.drop_grads()
        out = dense_encoder(self.dense_model, self.images, self.mask)
        out.backward(self.output_grad)
        expected, expected_grads = out.detach(), grads_by_name(self.dense_model)
        expected_rows = SparseTensor.from_dense(expected, self.mask, self.case.visible).features
        limit, errors = TOLERANCE[self.case.dtype], {}
        for name, model in self.models.items():
            self.drop_grads()
            out = self.encode(name)
            out.backward(self.grads[name].to(out.dtype))
            output = relative_error(out.detach(), expected_rows if name == "sparse" else expected)
            errors_by_name = {
                key: relative_error(grad, expected_grads[key]) for key, grad in grads_by_name(model).items()
            }
            # nan, which compares as neither, is the worst.
            worst = max(errors_by_name, key=lambda key: (math.isnan(errors_by_name[key]), errors_by_name[key]))
            gradient = errors_by_name[worst]
            if not (output <= limit and gradient <= limit):
                raise Mismatch(
                    f"{name} and dense in float32 differ in {self.case.key}: output {output:.1e}, "
                    f"gradient of {worst} {gradient:.1e}; at most {limit:g} is expected"
                )
            errors[name] = {"output": output, "gradient": gradient, "parameter": worst}
        self.drop_grads()
        return errors

    def time(self, repeats: int) -> dict[str, dict[str, Any]]:
        """Milliseconds of all variants, forward and forward + backward, see `measure.spread`."""
        result = {}
        for mode, step in (("forward", self.forward), ("forward_backward", self.forward_backward)):
            calls: dict[str, measure.Call] = {name: functools.partial(step, name) for name in self.models}
            calls["floor"] = functools.partial(self.floor, backward=mode == "forward_backward")
            times = measure.interleaved(calls, repeats, self.device, before=self.drop_grads)
            result[mode] = {name: measure.spread(repeated) for name, repeated in times.items()}
        return result

    def saved_bytes(self) -> dict[str, int]:
        """What autograd keeps for backward, by encoder."""
        inputs = [self.images, self.mask, *self.sparse_model.parameters(), *self.dense_model.parameters()]
        return {name: measure.saved_bytes(functools.partial(self.encode, name), inputs) for name in self.models}


def dense_encoder(model: ConvNeXtV2Encoder, images: Tensor, mask: Tensor) -> Tensor:
    """The last stage's output `(B, C, h, w)`, computed densely."""
    return masked_dense.forward_features(model, images, mask)[-1]


def randomize(model: ConvNeXtV2Encoder) -> None:
    """Weights that keep every branch as large as its input, and nothing left at 0 or 1: GRN starts at 0,
    where a wrong one would go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))


def block_products(model: ConvNeXtV2Encoder, case: Case) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Operands and outputs of the matrix products of every block: two of forward, then four of backward."""
    dtype, blocks = getattr(torch, case.dtype), []
    stage: Any
    for index, stage in enumerate(model.stages):
        rows = case.batch * case.visible * (8 >> index) ** 2
        channels = model.dims[index]
        v, g, y, dv = torch.randn(4, rows, channels, device=case.device).to(dtype)
        h, dh = torch.empty(2, rows, 4 * channels, device=case.device, dtype=dtype)
        for block in stage:
            w1, w2 = block.pwconv1.weight.detach().to(dtype), block.pwconv2.weight.detach().to(dtype)
            forward = [(v, w1.T, h), (h, w2.T, y)]
            backward = [
                (g, w2, dh),
                (g.T, h, torch.empty_like(w2)),
                (dh, w1, dv),
                (dh.T, v, torch.empty_like(w1)),
            ]
            blocks.append(forward + backward)
    return blocks


def grads_by_name(model: ConvNeXtV2Encoder) -> dict[str, Tensor]:
    """Gradients of all parameters; of one without, zero."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; nan where either is."""
    difference = torch.linalg.vector_norm(got.float() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp(min=1e-30))


@functools.cache
def peak_bytes(case: Case, name: str) -> int:
    """Peak memory of a forward + backward by one encoder, measured in a process of its own."""
    return int(measure.in_fresh_process(_peak_bytes, case, name))


def _peak_bytes(case: Case, name: str) -> int:
    def steps(workload: Workload) -> None:
        for _ in range(measure.WARM_UP):
            workload.forward_backward(name)
            workload.drop_grads()

    # What kernels keep from call to call counts, so libraries are loaded by one small image. Code that is
    # compiled for its shape has to meet that shape first; it keeps nothing.
    compiled = name == "compiled"
    warm = Workload(case if compiled else replace(case, batch=1, image=STRIDE, ratio=0.0), [name])
    steps(warm)
    workload = warm if compiled else Workload(case, [name])
    return measure.peak_bytes(functools.partial(steps, workload), workload.device)


def run_case(workload: Workload, repeats: int) -> dict[str, Any]:
    """Check, time and weigh one case.

    Raises:
        Mismatch: the encoders differ; nothing was timed.
    """
    case = workload.case
    say("  compiling where it is new, checking that outputs and gradients agree")
    errors = workload.check()
    for name, found in errors.items():
        say(f"  {name}: relative error {found['output']:.1e}, gradients {found['gradient']:.1e} ({found['parameter']})")
    say(f"  timing, {repeats} repeats")
    load = os.getloadavg()[0]
    times = workload.time(repeats)
    say("  measuring memory")
    # What dense encoders need does not depend on the mask: one measurement serves all ratios.
    peaks = {name: peak_bytes(case if name == "sparse" else replace(case, ratio=0.0), name) for name in workload.models}
    sparse = SparseTensor.from_dense(workload.images, workload.mask, case.visible)
    return {
        **asdict(case),
        "visible": case.visible,
        "patches": case.grid[0] * case.grid[1],
        "backend": block_operator.choose(sparse),
        "load": round(load, 2),
        "errors": errors,
        "ms": times,
        "saved_bytes": workload.saved_bytes(),
        "peak_bytes": peaks,
    }


def selected_cases(options: argparse.Namespace) -> list[Case]:
    """The cases asked for, those that share a `Workload` one after another."""
    grids = [{axis: getattr(options, axis) for axis in SWEEPS}]
    if options.sweep:
        axes = list(SWEEPS) if options.sweep == "all" else [options.sweep]
        grids = [{**grids[0], axis: SWEEPS[axis]} for axis in axes]
    found = {
        Case(options.dtype, options.device, options.threads, **dict(zip(grid, values, strict=True)))
        for grid in grids
        for values in itertools.product(*grid.values())
    }
    sizes = list(SIZES)
    return sorted(found, key=lambda case: (sizes.index(case.size), case.image, case.batch, case.ratio))


def measured(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case with its results, as soon as it has them."""
    encoders = [name for name in ENCODERS if name != "compiled" or options.compile]
    workload = None
    for number, case in enumerate(cases, start=1):
        say(f"[{number}/{len(cases)}] {case.key}")
        if workload is None or replace(workload.case, ratio=case.ratio) != case:
            workload = Workload(case, encoders)
        else:
            workload.set_ratio(case)
        yield case, run_case(workload, options.repeats)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the sparse encoder against the dense one. Several values: every combination."
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["atto", "tiny"], metavar="NAME")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.6], help="mask ratio, in [0, 1)")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--image", nargs="+", type=int, default=[224], help=f"pixels, a multiple of {STRIDE}")
    sweeps = "; ".join(f"{axis}: {' '.join(map(str, values))}" for axis, values in SWEEPS.items())
    parser.add_argument(
        "--sweep", choices=[*SWEEPS, "all"], help=f"these values in place of the option's own: {sweeps}"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="bfloat16 by autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out the compiled variant")
    parser.add_argument("--out", type=Path, help="results file (JSON); cases that it already holds are replaced")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw all of --out into this folder")
    options = parser.parse_args(arguments)
    for name in ("batch", "image", "threads", "repeats"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} is {value}: expected 1 or more")
    if options.plot and not options.out:
        parser.error("--plot draws what --out holds: give both")
    try:
        for case in selected_cases(options):
            if case.image % STRIDE:
                raise ValueError(f"--image is {case.image}: expected a multiple of {STRIDE}")
            _ = case.visible
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results = Results(options.out) if options.out else None
    found = []
    try:
        for case, result in measured(selected_cases(options), options):
            found.append(result)
            if results is not None:
                results.add(case.key, result)
    except Mismatch as error:
        say(f"not timed: {error}")
        return 1
    finally:
        print(report.tables(found))
    if results is not None and options.plot:
        report.plot(results.content["cases"].values(), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
