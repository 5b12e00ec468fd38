"""Times CUDA beside Triton, step by step, for the table from which `auto` chooses on a GPU (sparsecnx/choices.py).

    python benchmarks/choices.py
    python benchmarks/choices.py --size tiny --dtypes bfloat16 float32 --out choices.json

Every step is timed at the shapes of every stage of the models, 224-pixel images at mask ratio 0.6, as kernels.py times
kernels: everything queued, data out of the L2 cache. Packing also at those of images and of the pretraining decoder,
and at the end depthwise convolution with smaller kernels, at the widths of the first model. The two take turns, and
the median of each is kept. First their results are compared: where they differ by more than rounding, nothing is
written about that step and the exit code is 1. Times of this run are added to what the file knows, a shape at a time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import isolated
import kernels
import record
import steps
import torch
from atomic import write
from isolated import Task
from torch import Tensor

from sparsecnx import Layout, TileSet, choices, random_mask, use_backend
from sparsecnx.backends import compiled
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import STRIDE
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table
from sparsecnx.ops.global_response_norm import segments as segments_of

SECONDS = 0.05  # to repeat a step, twice
ROUNDS = 2
EPS = 1e-6
KERNEL, SMALLER = (7, 7), ((5, 5), (3, 3))  # of the models, and of others
PACKED = ((3, STRIDE), (512, 1))  # channels and tile of images, and of the decoder
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # of two backends that both round
GEOMETRY: dict[str, Any] = {"step": "geometry", "dtype": "float32", "channels": 1, "tile": None, "kernel": []}
ON_HIDDEN = ("grn", "grn_backward")  # in a block they work on 4C channels

Call = Callable[[], Any]


def step_calls(step: str, x: Tensor, layout: Layout, kernel: tuple[int, ...]) -> tuple[Call, Call]:
    """What runs a step on rows `x`: on Triton, and on CUDA."""
    channels, tile, device = x.shape[1], layout.tile, x.device
    cuda, depthwise, grn, packing = (
        torch.ops.sparsecnx_cuda,
        *(importlib.import_module(f"sparsecnx.{name}.triton") for name in ("ops.depthwise_conv", "ops.grn", "packing")),
    )
    grad = torch.randn_like(x)
    if step.startswith("depthwise_conv"):
        table = neighbour_table(layout, kernel)
        weight = torch.randn(channels, 1, *kernel, device=device, dtype=x.dtype) / kernel[0]
        bias = torch.randn(channels, device=device)
        if step == "depthwise_conv":
            arguments = (x, weight, bias, table, tile)
            return (
                functools.partial(torch.ops.sparsecnx_triton.depthwise_conv, *arguments),
                functools.partial(cuda.depthwise_conv, *arguments),
            )
        if step == "depthwise_conv_fused":
            return (
                functools.partial(depthwise.convolve, x, weight, bias, table, tile, normalise=EPS),
                functools.partial(cuda.depthwise_conv_fused, x, weight, bias, None, table, tile, False, EPS),
            )
        both = (grad, x, table, tile, *kernel)
        return (
            functools.partial(torch.ops.sparsecnx_triton.depthwise_conv_weight_grad, *both),
            functools.partial(cuda.depthwise_conv_weight_grad, *both),
        )
    if step.startswith("grn"):
        segments = segments_of(layout, "sample")
        groups = grn.row_groups(layout, "sample")
        gamma, beta = torch.randn(2, channels, device=device)
        if step == "grn":
            return (
                functools.partial(grn.grn_forward, x, gamma, beta, groups, segments, EPS),
                functools.partial(cuda.grn, x, gamma, beta, segments, EPS),
            )
        _, energy = grn.grn_forward(x, gamma, beta, groups, segments, EPS)
        return (
            functools.partial(grn.grn_backward, grad, x, gamma, groups, segments, energy, EPS),
            functools.partial(cuda.grn_backward, grad, x, gamma, segments, energy, EPS),
        )
    index, slots = layout.tiles.index, layout.tiles.slots()
    if step == "gather_tiles":
        dense = torch.randn(layout.batch, channels, *layout.shape, device=device, dtype=x.dtype)
        arguments = (dense, index, slots, tile)
        return functools.partial(packing.gather_tiles, *arguments), functools.partial(cuda.gather_tiles, *arguments)
    if step == "scatter_tiles":
        fill = torch.randn(channels, device=device, dtype=x.dtype)
        arguments = (x, fill, index, slots, layout.batch, *layout.shape, tile)
        return functools.partial(packing.scatter_tiles, *arguments), functools.partial(cuda.scatter_tiles, *arguments)
    if step == "geometry":
        mask, tiles = layout.tiles.mask(), layout.tiles
        return (
            functools.partial(geometry, "triton", mask, tiles.grid, tiles.visible),
            functools.partial(geometry, "cuda", mask, tiles.grid, tiles.visible),
        )
    raise AssertionError(f"{step} is no step of sparsecnx/choices.py")


def geometry(backend: str, mask: Tensor, grid: tuple[int, ...], visible: int) -> tuple[Tensor, ...]:
    """All that a network asks of a mask. Under "triton" torch's operators find it, see sparsecnx/layout.py."""
    with use_backend(backend):
        tiles = TileSet.from_mask(mask, grid, visible)
        return (tiles.index, tiles.splits, tiles.slots(), *(tiles.neighbours(radius) for radius in (1, 2, 3)))


def measure_step(case: dict[str, Any]) -> dict[str, Any]:
    """An entry of the table for a step at a shape.

    Raises:
        ArithmeticError: the two do not compute the same.
    """
    torch.manual_seed(0)
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    side, tile, step = case["image"] // STRIDE, case["side"], case["step"]
    mask = random_mask(case["batch"], (side, side), case["ratio"], generator=torch.Generator().manual_seed(0))
    visible = visible_count(side * side, case["ratio"])
    layout = Layout.from_mask(mask.to(device), (side * tile, side * tile), visible)
    x = torch.randn(layout.rows, case["channels"], device=device, dtype=dtype)
    triton, cuda = step_calls(step, x, layout, tuple(case["kernel"]))
    for ours, theirs in zip(tensors(cuda()), tensors(triton()), strict=True):
        error = float((ours.double() - theirs.double()).norm()) / (float(theirs.double().norm()) or 1.0)
        if not error <= (BOUNDS[case["dtype"]] if ours.is_floating_point() else 0):
            raise ArithmeticError(f"CUDA and Triton differ by {error:.1e}")
    flush = kernels.flusher(device)
    times: dict[str, list[float]] = {"triton_ms": [], "cuda_ms": []}
    for _ in range(ROUNDS):
        for name, call in (("triton_ms", triton), ("cuda_ms", cuda)):
            times[name] += kernels.repeated(call, device, flush, SECONDS)
    known = {name: case[name] for name in ("step", "dtype", "channels", "tile", "kernel")}
    return {**known, "rows": layout.rows, **{name: round(statistics.median(found), 5) for name, found in times.items()}}


def tensors(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def measure_shape(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of steps that share a shape, and what went wrong."""
    entries, problems = [], []
    for case in cases:
        try:
            entries.append(measure_step(case))
        except Exception as error:
            problems.append(f"{case['step']}: {isolated.reason(error)}")
        if case["device"] != "cpu":
            torch.cuda.empty_cache()
    return entries, problems


def shapes(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Steps to time, those of a shape together; what two models share once. By dtype, then in the order asked for."""
    packing, depthwise = (
        [step for step in options.steps if step.startswith(names)]
        for names in (("gather", "scatter"), ("depthwise_conv",))
    )
    of_layers = [step for step in options.steps if step != GEOMETRY["step"]]
    # Steps, channels, sites per tile side and kernel.
    stages = [
        (of_layers, width, 2 ** (4 - stage), KERNEL)
        for size in options.size
        for stage, width in enumerate(options.dims or SIZES[size].dims, start=1)
    ]
    wanted = [(packing, channels, side, KERNEL) for channels, side in PACKED] + stages
    smaller = [(depthwise, width, side, kernel) for kernel in SMALLER for _, width, side, _ in stages[:4]]
    every = [(dtype, *one) for some in (wanted, smaller) for dtype in options.dtypes for one in some]
    setting = {"image": options.image, "ratio": options.ratio, "device": options.device, "batch": options.batch[0]}
    if GEOMETRY["step"] in options.steps:
        yield [{**GEOMETRY, **setting, "side": 1}]
    known = set()
    for dtype, of_shape, width, side, kernel in every:
        cases = []
        for step in of_shape:
            shape = {
                "step": step,
                "dtype": dtype,
                "channels": 4 * width if step in ON_HIDDEN else width,
                "tile": None if step in ON_HIDDEN else side,
                "kernel": list(kernel) if step in depthwise else [],
            }
            if str(shape) in known:
                continue
            known.add(str(shape))
            cases.append({**shape, **setting, "side": side})
        if cases:
            yield cases


def save(path: Path, run: dict[str, Any]) -> None:
    """Add a run to the file, in the place of its earlier self; never a file that the package could not read.

    Raises:
        ValueError: a run of this or of the file is not in the format of sparsecnx/choices.py.
    """
    content = json.loads(path.read_text()) if path.exists() else {"runs": []}
    same = ("gpu", "date")
    runs = [other for other in content["runs"] if any(other.get(name) != run[name] for name in same)]
    text = json.dumps({"runs": [*runs, run]}, indent=1)
    # A measurement on one line.
    text = re.sub(r'\{\s*("step"[^{}]*?)\s*\}', lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as trial:
        trial.write(text)
        trial.flush()
        choices.read(Path(trial.name))
    write(path, text)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    sizes = ["tiny", "base", "huge", "atto", "large", "nano", "pico", "femto"]
    parser = steps.arguments("Time CUDA beside Triton for the table that `auto` chooses from.", list(SIZES))
    for action in parser._actions:
        if action.dest == "out":
            action.required = False
    parser.set_defaults(size=sizes, batch=[256], out=choices.PATH)
    parser.add_argument("--dims", nargs=4, type=int, metavar="C", help="channels of the stages, instead of a size's")
    parser.add_argument("--dtypes", nargs="+", choices=list(choices.DTYPES), default=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", nargs="+", choices=choices.STEPS, default=list(choices.STEPS))
    options = steps.parsed(parser, given)
    if options.device == "cpu" and options.out.resolve() == choices.PATH.resolve():
        parser.error(f"--device is cpu: {choices.PATH.name} holds measurements of GPUs, name another file with --out")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    device = steps.facts(options.device)
    run: dict[str, Any] = {
        "gpu": device["name"],
        "capability": [int(number) for number in device.get("capability", "0.0").split(".")],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "triton": record.version("triton") or "none",
        "toolkit": str((compiled.build_info() or {}).get("cuda")),
        "times": [],
    }
    tasks = []
    for cases in shapes(options):
        first = cases[0]
        kernel = "x".join(map(str, first["kernel"])) + " " if first["kernel"] else ""
        name = f"{first['dtype']} {kernel}tile {first['side']}, {first['channels']} channels and their like"
        tasks.append(Task(f"{name} ({len(tasks)})", measure_shape, (cases,), options.limit))
    failed = unfinished = False
    for outcome in isolated.outcomes(tasks, deadline=options.deadline):
        late = outcome.status == "skipped" or (outcome.status == "timeout" and outcome.seconds < options.limit)
        entries, problems = outcome.value if outcome.status == "done" else ([], [isolated.last_line(outcome.error)])
        unfinished |= late
        failed |= bool(problems) and not late
        if entries:
            run["times"] += entries
            save(options.out, run)
        faster = sum(entry["cuda_ms"] < entry["triton_ms"] for entry in entries)
        text = f"CUDA faster in {faster} of {len(entries)} steps" if entries else outcome.status
        print(f"  {outcome.task.name}: {'; '.join([text, *problems])} ({outcome.seconds:.0f} s)", file=sys.stderr)
    return 1 if failed else 3 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
