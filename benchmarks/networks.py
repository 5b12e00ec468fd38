"""Time unmodified networks of timm on a SparseTensor against the same networks dense, times the mask.

    python benchmarks/networks.py --out benchmarks/results/networks-cpu.json
    python benchmarks/networks.py --models resnet50 --threads 1 --repeats 3 --clock process --variants sparse dense
    python benchmarks/networks.py --models resnet50 --variants sparse --anatomy

Each network gets images and a mask and runs `forward_features` in training mode, forward and backward to the gradients
of all parameters. Variants:

    sparse          the network as timm makes it, on a SparseTensor; packing the images is timed too
    sparse_compiled the same through torch.compile
    dense           every convolution, normalisation and pooling on the whole image, then times the mask, as SparK,
                    lightly and mmpretrain do; BatchNorm takes its statistics from the visible sites by masked sums
    dense_gather    likewise, but BatchNorm runs on the visible sites, gathered and scattered again, as SparK has it
    compiled        `dense` through torch.compile
    *_nchw          with contiguous images and weights; those of the others are channels_last

Before anything is timed, outputs and gradients of `sparse` and `dense` are compared in float64, and outputs of all in
float32. Two orders of summation give gradients that differ by 1e-2 in float32, with BatchNorm and ReLU.

--anatomy also says where the time of `sparse` goes, in wall time: see `measure.anatomy`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import timm
import torch
from measure import Results, say
from torch import Tensor

from sparsecnx import SparseTensor
from sparsecnx.geometry.masks import random_mask, visible_count

# The most that forward + backward may take, relative to the best dense variant.
GOALS = {
    "resnet50": 0.40,
    "convnext_tiny": 0.32,
    "efficientnet_b0": 0.40,
    "mobilenetv3_large_100": 0.40,
    "regnety_004": 0.50,
    "resnext50_32x4d": 0.50,
    "densenet121": 0.55,
}
MEMORY_GOAL = 0.45
DENSE = ("dense", "dense_gather", "compiled", "dense_nchw", "dense_gather_nchw", "compiled_nchw")
VARIANTS = ("sparse", "sparse_compiled", *DENSE)
PATCH = 32
DOUBLE_LIMIT, FLOAT_LIMIT = 1e-8, 1e-3
LEAST = 1e-6  # smaller gradients, relative to the largest, are sums that cancel


@dataclass(frozen=True)
class Case:
    """One network at one setting."""

    model: str
    batch: int
    image: int
    ratio: float
    threads: int

    @property
    def key(self) -> str:
        return f"{self.model}-mask{self.ratio:g}-batch{self.batch}-{self.image}px-{self.threads}threads"

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image // PATCH, self.image // PATCH)

    @property
    def visible(self) -> int:
        return visible_count(self.grid[0] * self.grid[1], self.ratio)


class Dense:
    """A network dense, with masked sites set to zero after every convolution, normalisation and pooling.

    Args:
        network: changed for good, by hooks.
        mask: bool `(B, gh, gw)`, True = masked.
        image: pixels a side.
        gather: let BatchNorm run on gathered rows, rather than on masked sums.
    """

    LAYERS = (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d, timm.layers.LayerNorm2d, timm.layers.Mlp)

    def __init__(self, network: torch.nn.Module, mask: Tensor, image: int, gather: bool, dtype: torch.dtype) -> None:
        self.network = network
        visible = (~mask)[:, None]
        self.visible: dict[int, Tensor] = {}
        side = image
        while side >= mask.shape[-1]:
            factor = side // mask.shape[-1]
            self.visible[side] = visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3).to(dtype)
            side //= 2
        self.share = visible.to(dtype).mean((1, 2, 3), keepdim=True)
        self.batch_norm = self.gathered_batch_norm if gather else self.summed_batch_norm
        for module in network.modules():
            if isinstance(module, timm.layers.Mlp) and isinstance(module.fc1, torch.nn.Conv2d):
                continue  # its convolutions are masked already
            if isinstance(module, self.LAYERS):
                module.register_forward_hook(self.times_mask)
            elif isinstance(module, timm.layers.SqueezeExcite | timm.models._efficientnet_blocks.SqueezeExcite):
                first = getattr(module, "conv_reduce", None) or module.fc1
                first.register_forward_pre_hook(self.mean_of_visible)

    def times_mask(self, module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        if isinstance(module, timm.layers.Mlp):  # on (B, h, w, C), and masks what the LayerNorm before it left
            return out * self.visible[out.shape[1]].movedim(1, -1)
        return out if out.shape[-1] == 1 else out * self.visible[out.shape[-1]]

    def mean_of_visible(self, module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        """Make a mean over all sites, zeros included, one over the visible sites."""
        return args[0] / self.share

    def summed_batch_norm(
        self, x: Tensor, running_mean: Any, running_var: Any, weight: Tensor, bias: Tensor, *options: Any
    ) -> Tensor:
        _training, momentum, eps = options
        visible = self.visible[x.shape[-1]]
        count = visible.sum()
        mean = x.sum((0, 2, 3), keepdim=True) / count
        centred = (x - mean) * visible
        variance = centred.square().sum((0, 2, 3), keepdim=True) / count
        with torch.no_grad():
            running_mean.lerp_(mean.flatten(), momentum)
            running_var.lerp_((variance * count / (count - 1)).flatten(), momentum)
        scale = weight.view(1, -1, 1, 1) * torch.rsqrt(variance + eps)
        return centred * scale + bias.view(1, -1, 1, 1) * visible

    def gathered_batch_norm(self, x: Tensor, *options: Any) -> Tensor:
        sites = self.visible[x.shape[-1]].squeeze(1).nonzero(as_tuple=True)
        last = x.permute(0, 2, 3, 1)
        out = torch.zeros_like(last)
        out[sites] = self.plain_batch_norm(last[sites], *options)
        return out.permute(0, 3, 1, 2)

    plain_batch_norm = staticmethod(torch.nn.functional.batch_norm)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of the last stage `(B, C, h, w)`."""
        with mock.patch.object(torch.nn.functional, "batch_norm", self.batch_norm):
            return self.network.forward_features(images * self.visible[images.shape[-1]])


class Workload:
    """A network and images of a case, and the same features of them in several ways."""

    def __init__(self, case: Case, variants: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(case.threads)
        torch.compiler.reset()
        torch.manual_seed(0)
        self.case, self.variants = case, variants
        network = timm.create_model(case.model, num_classes=0).to(dtype).train()
        for module in network.modules():
            if hasattr(module, "drop_path_rate"):
                module.drop_path_rate = 0.0
        with torch.no_grad():  # nothing at 0 or 1, where a wrong factor would go unnoticed
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.images = torch.randn(case.batch, 3, case.image, case.image).to(dtype)
        flat = random_mask(case.batch, case.grid, case.ratio, generator=torch.Generator().manual_seed(0))
        self.mask = flat.view(-1, *case.grid)
        self.networks = {name: copy.deepcopy(network) for name in variants}
        self.calls: dict[str, Callable[[Tensor], Any]] = {}
        for name, copied in self.networks.items():
            if not name.endswith("nchw"):
                copied.to(memory_format=torch.channels_last)
            self.calls[name] = self.call_of(name, copied, dtype)
        self.layouts = {True: self.images, False: self.images.to(memory_format=torch.channels_last)}
        with torch.no_grad():
            channels = network.num_features
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(case.batch, channels, *case.grid, generator=generator).to(dtype)
        self.grads = {True: grad, False: grad.to(memory_format=torch.channels_last)}
        self.row_grad = self.rows(grad)

    def call_of(self, name: str, network: torch.nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Any]:
        if name.startswith("sparse"):
            features: Callable[[Tensor], Any] = network.forward_features
        else:
            features = Dense(network, self.mask, self.case.image, "gather" in name, dtype)
        if "compiled" in name:
            features = torch.compile(features, dynamic=False)
        return features

    def rows(self, dense: Tensor) -> Tensor:
        """Return the visible sites of the last stage as rows."""
        return SparseTensor.from_dense(dense, self.mask, self.case.visible).features

    def features(self, name: str) -> Tensor:
        """Return the last stage: `(rows, C)` of the sparse network, `(B, C, h, w)` of a dense one."""
        images = self.layouts[name.endswith("nchw")]
        if not name.startswith("sparse"):
            return self.calls[name](images)
        return self.calls[name](SparseTensor.from_dense(images, self.mask, self.case.visible)).features

    def step(self, name: str) -> Tensor:
        """Run forward and backward, to the gradients of all parameters, and return the output."""
        out = self.features(name)
        out.backward(self.row_grad if name.startswith("sparse") else self.grads[name.endswith("nchw")])
        return out.detach()

    def drop_grads(self) -> None:
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)

    def outputs(self) -> dict[str, dict[str, Tensor]]:
        """Return output and gradients of every variant."""
        found = {}
        for name, network in self.networks.items():
            out = self.step(name)
            found[name] = {"output": out if name.startswith("sparse") else self.rows(out), **measure.gradients(network)}
        self.drop_grads()
        return found

    def time(self, repeats: int, clock: str) -> dict[str, Any]:
        calls = {name: functools.partial(self.step, name) for name in self.variants}
        return measure.interleaved(calls, repeats, torch.device("cpu"), before=self.drop_grads, clock=clock)

    def anatomy(self, repeats: int) -> dict[str, Any]:
        """Return where forward and backward of the sparse network spend their time, see `measure.anatomy`."""
        step = functools.partial(self.step, "sparse")
        return measure.anatomy(step, repeats, before=self.drop_grads)

    def saved_bytes(self) -> dict[str, int]:
        """Return what autograd keeps for backward, by variant."""
        inputs = [*self.layouts.values(), self.mask]
        inputs += [parameter for network in self.networks.values() for parameter in network.parameters()]
        return {name: measure.saved_bytes(functools.partial(self.features, name), inputs) for name in self.variants}


def compare(case: Case, variants: Sequence[str]) -> dict[str, Any]:
    """Compare the variants with `dense` in float64, on two images, and return the errors.

    Raises:
        Mismatch: they differ.
    """
    found = Workload(Case(case.model, 2, case.image, case.ratio, case.threads), variants, torch.float64).outputs()
    expected = found.pop("dense")
    return {
        name: measure.compare(f"{name} {case.key}", got, expected, DOUBLE_LIMIT, LEAST) for name, got in found.items()
    }


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return a case with its errors, times and memory.

    Raises:
        Mismatch: the variants differ; nothing was timed.
    """
    eager = [name for name in options.variants if name in ("sparse", "dense_gather")]
    errors = compare(case, [*eager, "dense"])
    for name, error in errors.items():
        say(
            f"  {name}, float64: output {error['output']:.1e}, gradients {error['gradient']:.1e} ({error['parameter']})"
        )
    workload = Workload(case, options.variants)
    say("  compiling what is new, comparing outputs")
    outputs = {name: found["output"] for name, found in workload.outputs().items()}
    expected = next(iter(outputs.values()))
    for name, output in outputs.items():
        difference = measure.relative_error(output, expected)
        if not difference <= FLOAT_LIMIT:
            raise measure.Mismatch(f"{name} of {case.key} differs from {options.variants[0]} by {difference:.1e}")
    say(f"  timing, {options.repeats} repeats")
    settings = {"visible": case.visible, "patches": case.grid[0] * case.grid[1], "clock": options.clock}
    found = {**asdict(case), **settings, "load": round(os.getloadavg()[0], 2), "errors": errors}
    found |= {"ms": workload.time(options.repeats, options.clock), "saved_bytes": workload.saved_bytes()}
    return {**found, "anatomy": workload.anatomy(options.repeats)} if options.anatomy else found


def print_tables(cases: Sequence[dict[str, Any]]) -> None:
    """Print a line for each variant of each case, relative to the best dense variant."""
    lines = []
    for case in cases:
        ms = {name: found["median"] for name, found in case["ms"].items()}
        best = min((ms[name] for name in DENSE if name in ms), default=None)
        least = min((case["saved_bytes"][name] for name in DENSE if name in ms), default=None)
        for name, value in ms.items():
            kept = case["saved_bytes"][name]
            goal = GOALS.get(case["model"], "") if name.startswith("sparse") else ""
            ratios = [value / best if best else "", goal, kept / 2**20, kept / least if least else ""]
            lines.append([case["model"], name, value, *ratios])
    measure.print_table(("network", "variant", "ms", "of the best dense", "goal", "kept, MiB", "of the least"), lines)
    measure.print_anatomies({case["model"]: case["anatomy"] for case in cases if "anatomy" in case})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(GOALS), metavar="NAME", help="names of timm")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sparse", *DENSE])
    parser.add_argument("--ratio", type=float, default=0.6, help="mask ratio, in [0, 1)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224, help=f"pixels, a multiple of {PATCH}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: on a busy machine")
    parser.add_argument("--anatomy", action="store_true", help="also say where the sparse network spends its time")
    parser.add_argument("--out", type=Path, help="results file (JSON); cases that it already holds are replaced")
    options = parser.parse_args(arguments)
    if options.image % PATCH:
        parser.error(f"--image is {options.image}: expected a multiple of {PATCH}")
    unknown = [name for name in options.models if not timm.is_model(name)]
    if options.anatomy and "sparse" not in options.variants:
        parser.error(f"--variants has {' '.join(options.variants)}: --anatomy needs sparse")
    if unknown:
        parser.error(f"--models has {' '.join(unknown)}: timm {timm.__version__} has no such model")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    setting = (options.batch, options.image, options.ratio, options.threads)
    cases = [Case(model, *setting) for model in options.models]
    return measure.run_cases(cases, lambda case: measured(case, options), Results(options.out), print_tables)


if __name__ == "__main__":
    sys.exit(main())
