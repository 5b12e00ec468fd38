"""Every operator of a backend, forward and every gradient, against its dense reference in float64, at real shapes.

    python benchmarks/gpu_parity.py --out parity.json
    python benchmarks/gpu_parity.py --backend cuda --out parity-cuda.json

Needs torch, Triton and the package, nothing else: no test runner. Per stage of a model and dtype, on fresh random
inputs: images of which one is wholly masked, one wholly visible and the others in between; blocks that keep their
hidden layer and blocks that recompute it, with and without stochastic depth; GRN by image and by batch. Of CUDA also
the geometry, against that which torch computes on the CPU, bit by bit. An error is
||out - reference|| / ||reference||; where one is too large or not a number, or where a second run gives other bits,
it fails. Kernels are not tuned here but run in their first configuration: many processes share the GPU, and no
timing of theirs may be kept.

Exit code: 0 all agree, 1 something does not, 3 all that ran agree but time ran out.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import isolated
import steps
import torch
from atomic import write
from isolated import Task
from torch import Tensor

from sparsecnx import Layout, SparseTensor, ops, random_mask, use_backend
from sparsecnx.geometry.layout import TileSet
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import STRIDE

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
BATCH = 4
DROPPED = 0.5

Inputs = dict[str, Tensor]
Run = Callable[[SparseTensor, Inputs], Tensor]

ON_CUDA = ("block", "depthwise_conv", "grn", "gather", "scatter")  # the others have no CUDA kernels


def mask(side: int, batch: int) -> Tensor:
    """bool `(B, side, side)`: the second image wholly masked, the third wholly visible, two fifths of the others."""
    noise = torch.rand(batch, side, side, generator=torch.Generator().manual_seed(1))
    drawn = noise < 0.6
    drawn[0, 0, 0] = False
    if batch > 1:
        drawn[1] = True
    if batch > 2:
        drawn[2] = False
    return drawn


def operators(channels: int, layout: Layout) -> dict[str, tuple[Run, Callable[[], Inputs]]]:
    """By name, an operator on the features `inputs["x"]`, and what draws its inputs in float64.

    Vectors, which are float32 for every dtype of the features, have names ending in `_vector`.
    """
    hidden = 4 * channels
    device = layout.device

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, dtype=torch.float64)).to(device)

    def block_inputs() -> Inputs:
        return {
            "x": draw(layout.rows, channels),
            "dwconv_weight": draw(channels, 1, 7, 7, scale=1 / 7),
            "dwconv_bias_vector": draw(channels),
            "norm_weight_vector": draw(channels, scale=0.2, mean=1.0),
            "norm_bias_vector": draw(channels, scale=0.2),
            "pwconv1_weight": draw(hidden, channels, scale=channels**-0.5),
            "pwconv1_bias_vector": draw(hidden, scale=0.2),
            "grn_gamma_vector": draw(hidden, scale=0.2, mean=0.5),
            "grn_beta_vector": draw(hidden, scale=0.2),
            "pwconv2_weight": draw(channels, hidden, scale=hidden**-0.5),
            "pwconv2_bias_vector": draw(channels),
        }

    def block(recompute: bool, survival: Tensor | None, x: SparseTensor, a: Inputs) -> Tensor:
        parameters = ops.BlockParameters(*(value for name, value in a.items() if name != "x"))
        return ops.convnextv2_block(x, parameters, survival, recompute=recompute).features

    def grn(scope: str, x: SparseTensor, a: Inputs) -> Tensor:
        return ops.grn(x, a["gamma_vector"], a["beta_vector"], scope).features

    def depthwise_conv(x: SparseTensor, a: Inputs) -> Tensor:
        return ops.depthwise_conv(x, a["weight"], a.get("bias_vector")).features

    def conv(x: SparseTensor, a: Inputs) -> Tensor:
        return ops.conv(x, a["weight"], a["bias_vector"]).features

    def mapped_depthwise_conv(x: SparseTensor, a: Inputs) -> Tensor:
        kernel_map = layout.kernel_map((7, 7), 1, (3, 3))
        return ops.mapped_depthwise_conv(x.features, a["weight"], kernel_map, bias=a["bias_vector"])

    def mapped_conv(x: SparseTensor, a: Inputs) -> Tensor:
        return ops.mapped_conv(x.features, a["weight"], layout.kernel_map((3, 3), 1, (1, 1)), bias=a["bias_vector"])

    def layer_norm(x: SparseTensor, a: Inputs) -> Tensor:
        return ops.layer_norm(x, a["weight_vector"], a["bias_vector"]).features

    def stochastic_depth(x: SparseTensor, a: Inputs) -> Tensor:
        torch.manual_seed(3)
        return ops.stochastic_depth(x, DROPPED).features

    def gather(x: SparseTensor, a: Inputs) -> Tensor:
        return SparseTensor.from_dense(a["dense"], layout.tiles.mask()).features

    def scatter(x: SparseTensor, a: Inputs) -> Tensor:
        return x.dense(a["fill"])

    survival = torch.where(torch.arange(layout.batch, device=device) % 2 == 0, 1 / (1 - DROPPED), 0.0)
    survival[-1] = 1 / (1 - DROPPED)
    rows = functools.partial(draw, layout.rows)
    return {
        "block, kept": (functools.partial(block, False, None), block_inputs),
        "block, recomputed": (functools.partial(block, True, None), block_inputs),
        "block, kept, dropping": (functools.partial(block, False, survival), block_inputs),
        "block, recomputed, dropping": (functools.partial(block, True, survival), block_inputs),
        "depthwise_conv": (
            depthwise_conv,
            lambda: {
                "x": rows(channels),
                "weight": draw(channels, 1, 7, 7, scale=1 / 7),
                "bias_vector": draw(channels),
            },
        ),
        "conv": (
            conv,
            lambda: {
                "x": rows(channels),
                "weight": draw(channels, channels, 3, 3, scale=(9 * channels) ** -0.5),
                "bias_vector": draw(channels),
            },
        ),
        "mapped_depthwise_conv": (
            mapped_depthwise_conv,
            lambda: {"x": rows(channels), "weight": draw(49, channels, scale=1 / 7), "bias_vector": draw(channels)},
        ),
        "mapped_conv": (
            mapped_conv,
            lambda: {
                "x": rows(channels),
                "weight": draw(9, channels, channels, scale=(9 * channels) ** -0.5),
                "bias_vector": draw(channels),
            },
        ),
        "layer_norm": (
            layer_norm,
            lambda: {"x": rows(channels), "weight_vector": draw(channels), "bias_vector": draw(channels)},
        ),
        **{
            f"grn, {scope}": (
                functools.partial(grn, scope),
                lambda: {"x": rows(hidden), "gamma_vector": draw(hidden, mean=0.5), "beta_vector": draw(hidden)},
            )
            for scope in ("sample", "batch")
        },
        "stochastic_depth": (stochastic_depth, lambda: {"x": rows(channels)}),
        "gather": (gather, lambda: {"x": rows(1), "dense": draw(layout.batch, channels, *layout.shape)}),
        "scatter": (scatter, lambda: {"x": rows(channels), "fill": draw(channels)}),
    }


def results(run: Run, inputs: Inputs, layout: Layout, gradient: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The output and the gradients of all inputs by name, and the gradient that came in: of mean 1, so that its sums
    over rows do not cancel."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = run(SparseTensor(leaves["x"], layout), leaves)
    if gradient is None:
        gradient = 1 + torch.randn(out.shape, dtype=torch.float64).to(out.device)
    grads = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype), allow_unused=True)
    found = {"output": out.detach()}
    found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return found, gradient


def offered(backend: str, channels: int, layout: Layout) -> list[str]:
    """Names of the operators that a backend has kernels for."""
    names = operators(channels, layout)
    return [name for name in names if backend != "cuda" or name.split(",")[0] in ON_CUDA]


def check(name: str, channels: int, layout: Layout, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Errors of one operator in one dtype, by output and gradient, and whether it gives the same bits twice."""
    run, draw = operators(channels, layout)[name]
    torch.manual_seed(sum(map(ord, name)))
    rounded = {key: value.to(torch.float32 if key.endswith("_vector") else dtype) for key, value in draw().items()}
    exact = {key: value.double() for key, value in rounded.items()}
    with use_backend("reference"):
        _, gradient = results(run, exact, layout, None)
        gradient = gradient.to(dtype)
        expected, _ = results(run, exact, layout, gradient.double())
    with use_backend(backend):
        found, _ = results(run, rounded, layout, gradient)
        again, _ = results(run, rounded, layout, gradient)
    errors = {}
    for key, value in expected.items():
        scale = float(value.norm())
        missing = key not in found
        errors[key] = float("nan") if missing else float((found[key].double() - value).norm()) / (scale or 1.0)
    repeats = found.keys() == again.keys() and all(torch.equal(found[key], again[key]) for key in found)
    return {"errors": errors, "same_bits": repeats}


def geometry(drawn: Tensor, device: torch.device, radii: Sequence[int]) -> dict[str, Tensor]:
    """What is known of a mask, on the CPU: its tiles, counted or known beforehand, and their neighbours."""
    grid = tuple(drawn.shape[1:])
    equal = random_mask(drawn.shape[0], grid, 0.5, generator=torch.Generator().manual_seed(2))
    kept = int((~drawn).sum()), int((~equal[0]).sum())
    found = {}
    for name, tiles in {
        "counted": TileSet.from_mask(drawn.to(device), grid),
        "count": TileSet.from_mask(drawn.to(device), grid, count=kept[0]),
        "visible": TileSet.from_mask(equal.to(device), grid, kept[1]),
    }.items():
        values = {"index": tiles.index, "splits": tiles.splits, "slots": tiles.slots()}
        values |= {f"neighbours {radius}": tiles.neighbours(radius) for radius in radii}
        found |= {f"{name}, {key}": value.cpu() for key, value in values.items()}
    return found


def check_geometry(stage: dict[str, Any]) -> dict[str, Any]:
    """The part of each tensor of the geometry that is wrong."""
    drawn, radii = mask(stage["image"] // STRIDE, stage["batch"]), (1, 2, 3)
    with use_backend("reference"):
        expected = geometry(drawn, torch.device("cpu"), radii)
    with use_backend(stage["backend"]):
        found, again = (geometry(drawn, torch.device(stage["device"]), radii) for _ in range(2))
    errors = {key: differing(found[key], value) for key, value in expected.items()}
    repeats = all(torch.equal(found[key], again[key]) for key in found)
    return {"errors": errors, "same_bits": repeats, "agrees": repeats and not any(errors.values())}


def differing(found: Tensor, expected: Tensor) -> float:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return 1.0
    return float((found != expected).sum()) / max(1, expected.numel())


def check_stage(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every operator at a stage: `errors`, `same_bits`, `agrees`; or `error`, what it raised."""
    device, dtype = torch.device(stage["device"]), getattr(torch, stage["dtype"])
    side, tile = stage["image"] // STRIDE, stage["tile"]
    layout = Layout.from_mask(mask(side, stage["batch"]).to(device), (side * tile, side * tile))
    found: dict[str, dict[str, Any]] = {}
    if stage["backend"] == "cuda":
        try:
            found["geometry"] = check_geometry(stage)
        except Exception as error:
            found["geometry"] = {"error": isolated.reason(error), "agrees": False}
    for name in offered(stage["backend"], stage["channels"], layout):
        try:
            result = check(name, stage["channels"], layout, dtype, stage["backend"])
            within = all(error < BOUNDS[stage["dtype"]] for error in result["errors"].values())  # nan is not
            found[name] = {**result, "agrees": within and result["same_bits"]}
        except Exception as error:
            found[name] = {"error": isolated.reason(error), "agrees": False}
    return found


def stages(sizes: Sequence[str], dtypes: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """What to check, in the order of importance: the first size in every dtype, the others, whose kernels differ in
    little, in the first; settings that two sizes share once."""
    found: dict[tuple[int, int, str], dict[str, Any]] = {}
    for size in sizes:
        for dtype in dtypes if size == sizes[0] else dtypes[:1]:
            for stage in options.stage:
                channels, tile = (options.dims or SIZES[size].dims)[stage - 1], 2 ** (4 - stage)
                case = {"size": size, "stage": stage, "channels": channels, "tile": tile, "dtype": dtype}
                case |= {"image": options.image, "batch": options.batch[0], "device": options.device}
                case |= {"backend": options.backend}
                found.setdefault((channels, tile, dtype), case)
    return list(found.values())


def main(given: Sequence[str] | None = None) -> int:
    parser = steps.arguments("Hold every operator of a backend against its reference.", list(SIZES))
    parser.set_defaults(batch=[BATCH])
    parser.add_argument("--stage", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--dims", nargs=4, type=int, metavar="C", help="channels of the stages, instead of a size's")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--dtypes", nargs="+", choices=list(BOUNDS), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)), help="at a time")
    options = steps.parsed(parser, given)
    os.environ["SPARSECNX_AUTOTUNE"] = "0"
    tasks = [
        Task(f"{s['size']} stage {s['stage']} {s['dtype']}", check_stage, (s,), options.limit)
        for s in stages(options.size, options.dtypes, options)
    ]
    found: dict[str, Any] = {}
    wrong = unfinished = 0
    for outcome in isolated.outcomes(tasks, options.jobs, options.deadline):
        name = outcome.task.name
        if outcome.status == "done":
            found[name] = {"seconds": outcome.seconds, "operators": outcome.value}
            bad = [operator for operator, result in outcome.value.items() if not result["agrees"]]
            wrong += len(bad)
            say(name, outcome.value, bad, outcome.seconds)
        else:
            # Not started, or ended because the time of all was up: neither right nor wrong.
            late = outcome.status == "skipped" or (outcome.status == "timeout" and outcome.seconds < options.limit)
            unfinished += late
            wrong += not late
            found[name] = {"seconds": outcome.seconds, "status": outcome.status, "error": outcome.error[-4000:]}
            print(f"  {name}: {outcome.status}: {isolated.last_line(outcome.error)}", file=sys.stderr, flush=True)
        save(options.out, found, wrong, unfinished)
    print(f"  {len(found)} stages, {wrong} wrong, {unfinished} not finished", file=sys.stderr, flush=True)
    return 1 if wrong else 3 if unfinished else 0


def say(name: str, operators: dict[str, Any], bad: Sequence[str], seconds: float) -> None:
    """A line on a stage, and one on each operator that does not agree."""
    worst = max((error for r in operators.values() for error in r.get("errors", {}).values()), default=0.0)
    lines = [
        f"  {name}: {len(operators) - len(bad)} of {len(operators)} agree, largest error {worst:.1e} ({seconds:.0f} s)"
    ]
    for operator in bad:
        result = operators[operator]
        text = result.get("error") or ", ".join(
            [f"{key} {error:.1e}" for key, error in result["errors"].items()]
            + ([] if result["same_bits"] else ["not the same bits twice"])
        )
        lines.append(f"    WRONG {operator}: {text}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def save(path: Path, found: dict[str, Any], wrong: int, unfinished: int) -> None:
    """Write what is known so far."""
    content = {"bounds": BOUNDS, "wrong": wrong, "unfinished": unfinished, "stages": found}
    write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
