"""Compare the masked encoder as code for MinkowskiEngine has it, on MinkowskiEngine and here, with our own modules.

    make .venv/ready minkowski    # compiled operators; MinkowskiEngine 0.5.4 for the CPU, ten minutes, once
    PYTHONPATH=. build/minkowski/bin/python benchmarks/minkowski_encoder.py --out benchmarks/results/minkowski-cpu.json

Variants, on one set of weights, images and mask, in one process, in turn:

    minkowski     published_style.py on MinkowskiEngine itself, where it is installed (and built for the device)
    api           the same file, unchanged, on sparsecnx.compat.minkowski: a mask of patches, recognised as tiles
    api_general   the same without recognising them, as for any other pattern of sites
    fused         our own encoder, GRN over the batch as in the published code
    fused_sample  our own encoder, GRN by image
    floor         no encoder, only the matrix products of its blocks, see encoder.py

Before anything is timed, outputs and all gradients of the first four are compared with each other. What is timed is
forward + backward, from images and mask to the gradients of all parameters. For the code for MinkowskiEngine, forward +
backward of the depthwise convolutions of all blocks is also timed alone, with their kernel maps known already.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from types import ModuleType
from typing import Any
from unittest import mock

import measure
import torch
from encoder import block_products, randomize
from measure import Case, Results, say
from torch import Tensor, nn

from sparsecnx import SparseTensor
from sparsecnx.backends import minkowski as engine
from sparsecnx.compat import checkpoints, minkowski
from sparsecnx.compat.minkowski import operations
from sparsecnx.models import SIZES, create_fcmae


class Workload:
    """Weights and images of a case, and its encoders by name."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        self.case, self.device = case, torch.device(case.device)
        self.styles = styles(self.device)
        size = SIZES[case.size]
        fused = create_fcmae(case.size, grn_scope="batch")
        randomize(fused)
        published = checkpoints.convert(fused.state_dict(), "fcmae").state_dict
        self.models: dict[str, Any] = {}
        for name, style in self.styles.items():
            model = style.FCMAE(size.depths, size.dims)
            model.load_state_dict(published)
            self.models[name] = model.encoder.to(self.device)
        for name, scope in (("fused", "batch"), ("fused_sample", "sample")):
            model = create_fcmae(case.size, grn_scope=scope)
            model.load_state_dict(fused.state_dict())
            self.models[name] = model.encoder.to(self.device)
        self.images = case.images()
        self.mask = case.mask()
        self.grad = torch.randn(case.batch, size.dims[-1], *case.grid, device=self.device)
        self.grad_rows = self.rows(self.grad)
        self.floor = functools.partial(block_products(self.models["fused"], case), True)
        self.depthwise = {name: self.depthwise_inputs(name) for name in self.styles}

    def forward(self, name: str) -> Tensor:
        """Return the last stage: dense from code for MinkowskiEngine, rows from our own."""
        if name.startswith("fused"):
            return self.models[name](self.images, self.mask, self.case.visible).features
        # Tiles are not recognised, as if the pattern consisted of single sites.
        unrecognised = mock.patch.object(operations, "tiles_of_mask", lambda active: None)
        with unrecognised if name == "api_general" else nullcontext():
            encoded = self.models[name].features(self.images, self.mask.flatten(1).float())
            return encoded.dense(torch.Size(self.grad.shape))[0]

    def step(self, name: str) -> Tensor:
        """Run forward and backward, and return the output."""
        out = self.forward(name)
        out.backward(self.grad_rows if name.startswith("fused") else self.grad)
        return out.detach()

    def depthwise_inputs(self, name: str) -> list[tuple[nn.Module, Any, Tensor]]:
        """Return the depthwise layers of all blocks, each with an input and a gradient of its output."""
        found: list[tuple[nn.Module, Any, Tensor]] = []

        def keep(layer: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0]
            features = torch.randn_like(x.F).requires_grad_()
            key, manager = x.coordinate_map_key, x.coordinate_manager
            x = type(x)(features, coordinate_map_key=key, coordinate_manager=manager)
            found.append((layer, x, torch.randn_like(x.F)))

        layers = [block.dwconv for stage in self.models[name].stages for block in stage]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        with torch.no_grad():
            self.forward(name)
        for hook in hooks:
            hook.remove()
        return found

    def depthwise_step(self, name: str) -> None:
        """Run forward and backward of all depthwise layers."""
        for layer, x, grad in self.depthwise[name]:
            x.F.grad = None
            layer(x).F.backward(grad)

    def drop_grads(self) -> None:
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    def check(self) -> dict[str, dict[str, Any]]:
        """Compare outputs and gradients with those of `fused`, see `measure.compare`.

        Raises:
            Mismatch: they differ.
        """
        self.drop_grads()
        expected = {"output": self.step("fused"), **self.gradients("fused")}
        errors = {}
        for name in self.depthwise:
            found = {"output": self.rows(self.step(name)), **self.gradients(name)}
            errors[name] = measure.compare(f"{name} in {self.case.key}", found, expected, measure.TOLERANCE["float32"])
        self.drop_grads()
        return errors

    def rows(self, dense: Tensor) -> Tensor:
        return SparseTensor.from_dense(dense, self.mask).features

    def gradients(self, name: str) -> dict[str, Tensor]:
        """Return all gradients by the names and in the shapes of our own encoder."""
        found = {key: p.grad for key, p in self.models[name].named_parameters() if p.grad is not None}
        if not name.startswith("fused"):
            # Gradients have the shapes of weights, so that what converts these converts those.
            found = checkpoints.convert({f"encoder.{key}": grad for key, grad in found.items()}, "sparsecnx").state_dict
            found = {key.removeprefix("encoder."): grad for key, grad in found.items()}
        return found


@functools.cache
def styles(device: torch.device) -> dict[str, ModuleType]:
    """Return published_style.py as each library runs it, by name of the variant.

    Only once: where MinkowskiEngine itself has been imported, the stand-in for it refuses to be installed.
    """
    minkowski.install()
    try:
        here = _fresh_style()
    finally:
        minkowski.uninstall()
    refusal = engine.device_refusal(device)
    if refusal is not None:
        say(f"without MinkowskiEngine itself: {refusal}")
        return {"api": here, "api_general": here}
    return {"minkowski": _fresh_style(), "api": here, "api_general": here}


def _fresh_style() -> ModuleType:
    sys.modules.pop("published_style", None)
    return importlib.import_module("published_style")


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    """Check and time one case.

    Raises:
        Mismatch: the encoders differ; nothing was timed.
    """
    workload = Workload(case)
    errors = workload.check()
    steps: dict[str, dict[str, measure.Call]] = {
        "encoder": {name: functools.partial(workload.step, name) for name in workload.models},
        "depthwise": {name: functools.partial(workload.depthwise_step, name) for name in workload.depthwise},
    }
    steps["encoder"]["floor"] = workload.floor
    times = {
        kind: measure.interleaved(calls, repeats, workload.device, before=workload.drop_grads)
        for kind, calls in steps.items()
    }
    return {**asdict(case), "load": round(os.getloadavg()[0], 2), "errors": errors, "ms": times}


def print_table(cases: Sequence[dict[str, Any]]) -> None:
    """Print medians, and how they compare with our own encoder and with MinkowskiEngine."""
    rows = []
    for case in cases:
        for kind, times in case["ms"].items():
            medians = {name: found["median"] for name, found in times.items()}
            for name, ms in medians.items():
                by_fused = ms / medians["fused"] if "fused" in medians else ""
                by_engine = ms / medians["minkowski"] if "minkowski" in medians else ""
                rows.append([f"{case['size']}, {kind}", name, ms, by_fused, by_engine])
    measure.print_table(["forward + backward", "variant", "ms", "of fused", "of MinkowskiEngine"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.set_defaults(repeats=5)
    options = measure.parse(parser, arguments)
    if options.dtype != "float32":
        parser.error(f"--dtype is {options.dtype}: MinkowskiEngine computes in float32")
    run = functools.partial(run_case, repeats=options.repeats)
    return measure.run_cases(measure.cases(options), run, Results(options.out), print_table)


if __name__ == "__main__":
    sys.exit(main())
