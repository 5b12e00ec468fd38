"""Measure what Python costs around one call: checks, dispatch, and how torch asks a SparseTensor.

    python benchmarks/overhead.py

First, what a module of ours adds to the torch operator that it ends in. Every module runs on a SparseTensor with a few
rows, on one thread, and so does its operator alone: the last call of `torch.ops.sparsecnx.*` that the module makes (of
a matrix product where it makes none), with the same arguments. Both run without gradients, and forward + backward with
gradients of rows and parameters. The goal is that a module adds at most 60 microseconds.

Second, what a module of torch costs on a SparseTensor more than on an ordinary tensor of as many sites, without
gradients. Both do the same work on a few rows. The goal is at most 15 microseconds.

The exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Results, print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsecnx import SparseTensor, nn

GOAL = 60.0  # microseconds
GOAL_OF_TORCH = 15.0
CHANNELS = 8
CALLS = 5  # in one time; the least time is taken, since other processes only add to it
PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


class LastOperator(TorchDispatchMode):
    """Remembers the last operator of ours that was called, or else the last matrix product, with its arguments."""

    call: tuple[Any, tuple[Any, ...], dict[str, Any]]
    _ours = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = func.namespace.startswith("sparsecnx")
        if ours or (func in PRODUCTS and not self._ours):
            self.call, self._ours = (func, args, kwargs), ours
        return func(*args, **kwargs)


def cases() -> dict[str, tuple[Callable[[Any], SparseTensor], Any]]:
    """Return modules, and `SparseTensor.from_dense`, each with an input."""
    mask = torch.tensor([[[True, False], [False, True]]])

    def from_dense(x: Tensor) -> SparseTensor:
        return SparseTensor.from_dense(x, mask, visible=2)

    def rows(tile: int) -> SparseTensor:
        x = from_dense(torch.randn(1, CHANNELS, 2 * tile, 2 * tile))
        return x.with_features(x.features.clone().requires_grad_())

    return {
        "ConvNeXtV2Block": (nn.ConvNeXtV2Block(CHANNELS), rows(1)),
        "LayerNorm": (nn.LayerNorm(CHANNELS), rows(1)),
        "GRN": (nn.GRN(CHANNELS), rows(1)),
        "Conv2d": (nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2), rows(2)),
        "StochasticDepth": (nn.StochasticDepth(0.1), rows(1)),
        "Linear": (nn.Linear(CHANNELS, CHANNELS), rows(1)),
        "from_dense": (from_dense, torch.randn(1, CHANNELS, 2, 2, requires_grad=True)),
    }


def cases_of_torch() -> dict[str, tuple[Callable[[Any], Any], int]]:
    """Return modules and functions of torch with the tile side of their input, which has two visible tiles."""
    scale = torch.ones(1, CHANNELS, 1, 1)
    return {
        "ReLU": (torch.nn.ReLU(inplace=False), 2),
        "Conv2d 1x1": (torch.nn.Conv2d(CHANNELS, CHANNELS, 1), 2),
        "Conv2d 1x1, stride 2": (torch.nn.Conv2d(CHANNELS, CHANNELS, 1, 2), 4),
        "Conv2d 3x3": (torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), 2),
        "Conv2d 3x3, stride 2": (torch.nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), 4),
        "Conv2d 3x3, grouped": (torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2), 2),
        "Conv2d 3x3, depthwise": (torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), 2),
        "ConvTranspose2d 2x2": (torch.nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2), 2),
        "BatchNorm2d": (torch.nn.BatchNorm2d(CHANNELS), 2),
        "BatchNorm2d, eval": (torch.nn.BatchNorm2d(CHANNELS).eval(), 2),
        "GroupNorm": (torch.nn.GroupNorm(2, CHANNELS), 2),
        "InstanceNorm2d": (torch.nn.InstanceNorm2d(CHANNELS), 2),
        "add": (lambda x: x + x, 2),
        "mul, of each image": (lambda x: x * scale, 2),
        "squeeze and excite": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 2),
        "cat": (lambda x: torch.cat([x, x], 1), 2),
        "MaxPool2d": (torch.nn.MaxPool2d(3, 2, 1), 4),
        "AvgPool2d": (torch.nn.AvgPool2d(2), 4),
        "AvgPool2d 3x3": (torch.nn.AvgPool2d(3, 1, 1), 4),
        "AdaptiveAvgPool2d": (torch.nn.AdaptiveAvgPool2d(1), 4),
        "Upsample": (torch.nn.Upsample(scale_factor=2), 2),
        "mean": (lambda x: x.mean((2, 3), keepdim=True), 2),
        "permute": (lambda x: x.permute(0, 2, 3, 1), 2),
        "LayerNorm": (torch.nn.LayerNorm(CHANNELS), 2),
        "Linear": (torch.nn.Linear(CHANNELS, CHANNELS), 2),
    }


def measured_of_torch(module: Callable[[Any], Any], tile: int, repeats: int) -> dict[str, float]:
    """Return microseconds of a module on a SparseTensor and on an ordinary tensor of as many sites."""
    mask = torch.tensor([[[True, False], [False, True]]])
    sparse: Any = SparseTensor.from_dense(torch.randn(1, CHANNELS, 2 * tile, 2 * tile), mask, visible=2)
    dense = torch.randn(1, CHANNELS, tile, 2 * tile)
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.Linear)):
        sparse, dense = sparse.permute(0, 2, 3, 1), dense.permute(0, 2, 3, 1)
    with torch.no_grad():
        return least_us({"module": lambda: module(sparse), "operator": lambda: module(dense)}, repeats)


def measured(module: Callable[[Any], SparseTensor], x: Any, repeats: int) -> dict[str, dict[str, float]]:
    """Return microseconds of a module and of its operator, without and with gradients."""

    def run_module() -> Tensor:
        return module(x).features

    with torch.no_grad():
        run_operator, _ = last_operator(run_module)
        without = least_us({"module": run_module, "operator": run_operator}, repeats)
    run_operator, leaves = last_operator(run_module)
    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    inputs = [x.features if isinstance(x, SparseTensor) else x, *parameters]
    grad, operator_grad = torch.ones_like(run_module()), torch.ones_like(run_operator())
    steps = {
        "module": lambda: torch.autograd.grad(run_module(), inputs, grad),
        "operator": lambda: torch.autograd.grad(run_operator(), leaves, operator_grad),
    }
    return {"without gradients": without, "with gradients": least_us(steps, repeats)}


def last_operator(run: Callable[[], object]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the last operator that `run` calls, as a call of its own, and its arguments that ask for gradients."""
    recorder = LastOperator()
    with recorder:
        run()
    func, args, kwargs = recorder.call
    # Its arguments become leaves, at which backward of the operator ends.
    args = tree_map(lambda v: v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v, args)

    def call() -> Tensor:
        out = func(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    return call, [v for v in tree_leaves(args) if isinstance(v, Tensor) and v.requires_grad]


def least_us(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time a module and its operator in turn, and return their least times in microseconds and what the module adds."""
    least = dict.fromkeys(calls, math.inf)
    for repeat in range(-repeats // 10, repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            if repeat >= 0:
                least[name] = min(least[name], 1e6 * (time.perf_counter() - begin) / CALLS)
    return {name: round(us, 2) for name, us in {**least, "added": least["module"] - least["operator"]}.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results, rows = Results(options.out), []
    for name, (module, x) in cases().items():
        found = measured(module, x, options.repeats)
        results.add(name, found)
        for mode, us in found.items():
            rows.append([name, mode, us["module"], us["operator"], us["added"], "" if us["added"] <= GOAL else "above"])
    print_table(["", "", "module, us", "its operator, us", "added, us", f"goal: {GOAL:g} us"], rows)
    of_torch = []
    for name, (function, tile) in cases_of_torch().items():
        us = measured_of_torch(function, tile, options.repeats)
        results.add(f"torch {name}", {"sparse": us["module"], "dense": us["operator"], "added": us["added"]})
        above = "" if us["added"] <= GOAL_OF_TORCH else "above"
        of_torch.append([name, us["module"], us["operator"], us["added"], above])
    print_table(["", "SparseTensor, us", "tensor, us", "added, us", f"goal: {GOAL_OF_TORCH:g} us"], of_torch)
    return int(any(row[-1] for row in rows + of_torch))


if __name__ == "__main__":
    sys.exit(main())
