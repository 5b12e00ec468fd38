"""The masked encoder as code for MinkowskiEngine has it, on MinkowskiEngine and here, beside our own modules.

    make .venv/ready minkowski    # compiled operators; MinkowskiEngine 0.5.4 for the CPU, ten minutes, once
    PYTHONPATH=. build/minkowski/bin/python benchmarks/minkowski_encoder.py --out benchmarks/results/minkowski-cpu.json

One set of weights, images and mask, in one process, in turn:

    minkowski     published_style.py on MinkowskiEngine itself, where it is installed (and built for the device)
    api           the same file, unchanged, on sparsecnx.compat.minkowski: a mask of patches, recognised as tiles
    api_general   the same without recognising them: any other pattern of sites takes this path
    fused         our own encoder, GRN over the batch as the published code has it
    fused_sample  our own encoder, GRN by image
    floor         no encoder, only the matrix products of its blocks, see encoder.py

Before anything is timed, outputs and all gradients of the first four are held against each other. Timed is forward +
backward, from images and mask to the gradients of all parameters; and, of the code for MinkowskiEngine, forward +
backward of the depthwise convolutions alone, all blocks, their kernel maps known already.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import measure
import torch
from encoder import Case, Mismatch, block_products, randomize, relative_error
from record import Results
from torch import Tensor, nn

from sparsecnx import SparseTensor, random_mask
from sparsecnx.backends import minkowski
from sparsecnx.compat import checkpoints, minkowski
from sparsecnx.compat.minkowski import operations
from sparsecnx.models import SIZES, create_fcmae
from sparsecnx.models.convnextv2 import STRIDE

TOLERANCE = 1e-4  # largest ||got - expected|| / ||expected||, float32
STYLES = ("minkowski", "api", "api_general")  # published_style.py
SAME = (*STYLES, "fused")  # compute the same


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
        self.models: dict[str, nn.Module] = {}
        for name in STYLES:
            if name in self.styles:
                model = self.styles[name].FCMAE(size.depths, size.dims)
                model.load_state_dict(published)
                self.models[name] = model.encoder.to(self.device)
        for name, scope in (("fused", "batch"), ("fused_sample", "sample")):
            model = create_fcmae(case.size, grn_scope=scope)
            model.load_state_dict(fused.state_dict())
            self.models[name] = model.encoder.to(self.device)
        self.images = torch.randn(case.batch, 3, case.image, case.image, device=self.device)
        mask = random_mask(case.batch, case.grid, case.ratio, generator=torch.Generator().manual_seed(0))
        self.mask = mask.to(self.device)
        self.grad = torch.randn(case.batch, size.dims[-1], *case.grid, device=self.device)
        at_sites = SparseTensor.from_dense(self.grad, self.mask.view(-1, *case.grid))
        self.grad_rows = at_sites.features
        self.products = block_products(self.models["fused"], case)
        self.depthwise = {name: self.depthwise_inputs(name) for name in self.models if name in STYLES}

    def forward(self, name: str) -> Tensor:
        """The last stage: dense by code for MinkowskiEngine, rows by our own."""
        if name.startswith("fused"):
            features: Tensor = self.models[name](self.images, self.mask, self.case.visible).features
            return features
        with unrecognised() if name == "api_general" else nullcontext():
            encoded = self.models[name].features(self.images, self.mask.float())
            dense: Tensor = encoded.dense(torch.Size(self.grad.shape))[0]
            return dense

    def step(self, name: str) -> Tensor:
        """Forward and backward; the output."""
        out = self.forward(name)
        out.backward(self.grad_rows if name.startswith("fused") else self.grad)
        return out.detach()

    def floor(self) -> None:
        """The matrix products of all blocks, forward and backward."""
        with torch.no_grad():
            for products in self.products:
                for a, b, out in products:
                    torch.mm(a, b, out=out)

    def depthwise_inputs(self, name: str) -> list[tuple[nn.Module, Any, Tensor]]:
        """The depthwise layers of all blocks, each with an input, and a gradient of its output."""
        found: list[tuple[nn.Module, Any, Tensor]] = []

        def keep(layer: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0]
            features = torch.randn_like(x.F).requires_grad_()
            key, manager = x.coordinate_map_key, x.coordinate_manager
            x = type(x)(features, coordinate_map_key=key, coordinate_manager=manager)
            found.append((layer, x, torch.randn_like(x.F)))

        model: Any = self.models[name]
        layers = [block.dwconv for stage in model.stages for block in stage]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        with torch.no_grad():
            self.forward(name)
        for hook in hooks:
            hook.remove()
        return found

    def depthwise_step(self, name: str) -> None:
        """Forward and backward of all depthwise layers."""
        for layer, x, grad in self.depthwise[name]:
            x.F.grad = None
            layer(x).F.backward(grad)

    def drop_grads(self) -> None:
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    def check(self) -> dict[str, dict[str, Any]]:
        """Largest relative errors of outputs and gradients against `fused`.

        Raises:
            Mismatch: one is above `TOLERANCE`.
        """
        found = {}
        for name in (name for name in SAME if name in self.models):
            self.drop_grads()
            out = self.step(name)
            rows = out if name == "fused" else self.rows(out)
            found[name] = {"output": rows, **self.gradients(name)}
        self.drop_grads()
        errors = {}
        for name, tensors in found.items():
            if name != "fused":
                by_name = {key: relative_error(value, found["fused"][key]) for key, value in tensors.items()}
                worst = max(by_name, key=lambda key: by_name[key])
                if not by_name[worst] <= TOLERANCE:
                    raise Mismatch(f"{name} and fused differ in {self.case.key}: {worst} by {by_name[worst]:.1e}")
                errors[name] = {"output": by_name["output"], "largest": by_name[worst], "of": worst}
        return errors

    def rows(self, dense: Tensor) -> Tensor:
        return SparseTensor.from_dense(dense, self.mask.view(-1, *self.case.grid)).features

    def gradients(self, name: str) -> dict[str, Tensor]:
        """By the names and in the shapes of our own encoder."""
        found = {key: p.grad for key, p in self.models[name].named_parameters() if p.grad is not None}
        if not name.startswith("fused"):
            # Gradients have the shapes of weights, so that what converts these converts those.
            found = checkpoints.convert({f"encoder.{key}": grad for key, grad in found.items()}, "sparsecnx").state_dict
            found = {key.removeprefix("encoder."): grad for key, grad in found.items()}
        return found


@contextmanager
def unrecognised() -> Iterator[None]:
    """Tiles are not recognised, as if the pattern consisted of single sites."""
    recognise = operations.tiles_of_mask
    operations.tiles_of_mask = lambda active: None  # type: ignore[assignment]
    try:
        yield
    finally:
        operations.tiles_of_mask = recognise


@functools.cache
def styles(device: torch.device) -> dict[str, ModuleType]:
    """published_style.py as each library runs it, by name of the variant. Once: where MinkowskiEngine itself has been
    imported, the stand-in for it refuses to be installed."""
    minkowski.install()
    try:
        here = _fresh_style()
    finally:
        minkowski.uninstall()
    found = {"api": here, "api_general": here}
    refusal = minkowski.refusal(device)
    if refusal is None:
        found["minkowski"] = _fresh_style()
    else:
        say(f"without MinkowskiEngine itself: {refusal}")
    return found


def _fresh_style() -> ModuleType:
    sys.modules.pop("published_style", None)
    return importlib.import_module("published_style")


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    """Check and time one case.

    Raises:
        Mismatch: the encoders differ; nothing was timed.
    """
    workload = Workload(case)
    say(f"{case.key}: checking that outputs and gradients agree")
    errors = workload.check()
    for name, error in errors.items():
        say(f"  {name}: output {error['output']:.1e}, largest {error['largest']:.1e} ({error['of']})")
    say(f"  timing, {repeats} repeats")
    steps: dict[str, measure.Call] = {name: functools.partial(workload.step, name) for name in workload.models}
    depthwise: dict[str, measure.Call] = {
        name: functools.partial(workload.depthwise_step, name) for name in workload.depthwise
    }
    times = {}
    for kind, calls in (("encoder", {**steps, "floor": workload.floor}), ("depthwise", depthwise)):
        measured = measure.interleaved(calls, repeats, workload.device, before=workload.drop_grads)
        times[kind] = {name: measure.spread(values) for name, values in measured.items()}
    return {**asdict(case), "load": round(os.getloadavg()[0], 2), "errors": errors, "ms": times}


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Medians, and how many times as fast as MinkowskiEngine that is."""
    lines = []
    for case in cases:
        lines.append(f"{case['size']}, mask {case['ratio']:g}, batch {case['batch']}, {case['image']} px")
        for kind, times in case["ms"].items():
            medians = {name: spread["median"] for name, spread in times.items()}
            for name, median in medians.items():
                against = medians.get("minkowski")
                line = f"  {kind:10} {name:14} {median:10.1f} ms"
                if "fused" in medians:
                    line += f"{median / medians['fused']:8.2f} x fused"
                if against is not None:
                    line += f"{against / median:8.1f} x as fast as MinkowskiEngine"
                lines.append(line)
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the encoder on MinkowskiEngine, on its API here, and fused.")
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["atto", "tiny"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224, help=f"pixels, a multiple of {STRIDE}")
    parser.add_argument("--ratio", type=float, default=0.6, help="mask ratio, in [0, 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results file (JSON); cases that it already holds are replaced")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results = Results(options.out) if options.out else None
    found = []
    try:
        for size in options.size:
            case = Case("float32", options.device, options.threads, size, options.batch, options.image, options.ratio)
            found.append(run_case(case, options.repeats))
            if results is not None:
                results.add(case.key, found[-1])
    except Mismatch as error:
        say(f"not timed: {error}")
        return 1
    finally:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
