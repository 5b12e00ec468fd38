"""Compare the sparse encoder with the dense one: the same weights, images and mask, in one process, in turn.

    python benchmarks/encoder.py --out benchmarks/results/encoder-cpu.json
    python benchmarks/encoder.py --sweep all --out benchmarks/results/encoder-cpu.json --plot benchmarks/results
    python benchmarks/encoder.py --variants sparse --ratio 0.6 0.9 --anatomy
    python benchmarks/encoder.py --device cuda --dtype bfloat16 --size tiny base --batch 64 --by-block --out gpu.json

Variants:

    sparse         the sparse encoder, from images and mask: packing pixels and building neighbour tables are timed too
    sparse_graph   the same as a CUDA graph, on a GPU
    dense          all operators on the whole image, times the mask (`sparsecnx.models.masked_dense`), eager
    compiled       the same through torch.compile: as a whole, or with --by-block block by block, which compiles faster
    dense_nchw     eager, images and weights contiguous; those of the two above are channels_last
    compiled_nchw  likewise, compiled
    floor          no encoder, only the matrix products of its blocks at the visible rows: two a block, with backward
                   six; in float32 on a CPU by our own kernel, as in the encoder, otherwise by torch's

Before anything is timed, outputs and all parameter gradients are compared with the dense encoder in float32. In 16 bits
an encoder may be as far off as the eager dense one is under the same autocast, see `Workload.limit`. Forward alone is
timed without gradients. Forward + backward is timed with gradients of all parameters, which start out as None. On a
CPU the process keeps the memory that it frees, as `sparsecnx pretrain` does, but where its peak is measured.

Memory, for each encoder: `saved_bytes` is what autograd keeps for backward, without parameters and images. `peak_bytes`
is the peak of forward + backward, gradients included, beyond weights and images; on the CPU it is measured in a fresh
process, for the compiled encoder after its first steps, since compiling needs more than running.

--anatomy also says where the time of `sparse` goes on a CPU, see `Workload.anatomy`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import plots
import torch
from measure import Case, Results, say
from torch import Tensor

from sparsecnx import SparseTensor
from sparsecnx.common.memory import keep_freed_memory
from sparsecnx.models import SIZES, ConvNeXtV2Encoder, masked_dense
from sparsecnx.models.convnextv2 import STRIDE
from sparsecnx.ops.linear import linear

VARIANTS = ("sparse", "sparse_graph", "dense", "compiled", "dense_nchw", "compiled_nchw")
SWEEPS: dict[str, tuple[Any, ...]] = {
    "size": ("atto", "pico", "tiny"),
    "ratio": (0.0, 0.25, 0.5, 0.6, 0.75, 0.9),
    "batch": (1, 2, 4, 8, 16),
    "image": (160, 224, 320),
}


class Workload:
    """Weights and images of a case, and the same encoding of them in several ways.

    Args:
        case: its ratio is the one to start with.
        variants: the encoders to offer, of `VARIANTS`.
        by_block: compile the dense encoders block by block.
    """

    def __init__(self, case: Case, variants: Sequence[str] = ("sparse", "dense"), by_block: bool = False) -> None:
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        torch.compiler.reset()
        size = SIZES[case.size]
        self.device, self.by_block = torch.device(case.device), by_block
        self.reference = ConvNeXtV2Encoder(size.depths, size.dims)
        randomize(self.reference)
        self.reference.to(self.device)
        images, grad = case.images(), torch.randn(case.batch, size.dims[-1], *case.grid).to(self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.output_grad = grad.to(memory_format=torch.channels_last)
        # The dense encoders get images in the dtype of autocast, which bring the mask, and so all features, to it.
        low = images.to(getattr(torch, case.dtype))
        self.dense_images = {False: low.to(memory_format=torch.channels_last), True: low}
        self.dense_grads = {False: self.output_grad, True: grad}
        self.models = {name: copy.deepcopy(self.reference) for name in variants}
        for name in {"dense", "compiled"} & self.models.keys():
            self.models[name].to(memory_format=torch.channels_last)
        self.functions = {
            name: compiled_encoder(model, by_block) if name.startswith("compiled") else masked_encoder
            for name, model in self.models.items()
        }
        self.eager = [name for name in self.models if name != "sparse_graph"]
        self.set_ratio(case)

    def set_ratio(self, case: Case) -> None:
        """Change the mask ratio and leave all else as it is."""
        self.case = case
        self.mask = case.mask()
        self.row_grad = self.rows(self.output_grad)
        self.floor = block_products(self.reference, case)
        self.graphs: dict[str, Callable[[], Tensor]] = {}

    def encode(self, name: str) -> Tensor:
        """Return the last stage: `(rows, C)` from the sparse encoder, `(B, C, h, w)` from a dense one."""
        with measure.autocast(self.case.device, self.case.dtype):
            if name.startswith("sparse"):
                return self.models[name](self.images, self.mask, self.case.visible).features
            return self.functions[name](self.models[name], self.dense_images[name.endswith("nchw")], self.mask)

    def forward_backward(self, name: str) -> Tensor:
        """Run forward and backward, to the gradients of all parameters, and return the output."""
        out = self.encode(name)
        grad = self.row_grad if name.startswith("sparse") else self.dense_grads[name.endswith("nchw")]
        out.backward(grad.to(out.dtype))
        return out.detach()

    def call(self, name: str, mode: str) -> Callable[[], Tensor]:
        """Return the call to time: a pass of an encoder, as a graph where the variant is one."""
        run = self.forward_backward if mode == "forward_backward" else torch.no_grad()(self.encode)
        step = functools.partial(run, name)
        if name != "sparse_graph":
            return step
        if mode not in self.graphs:
            reset = functools.partial(self.models[name].zero_grad, set_to_none=True)
            self.graphs[mode] = measure.captured(step, reset, self.device)
        return self.graphs[mode]

    def drop_grads(self) -> None:
        """Set all gradients to None."""
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    def check(self) -> dict[str, dict[str, Any]]:
        """Compare every encoder with the dense one in float32.

        Raises:
            Mismatch: outputs or gradients differ by more than `limit`.
        """
        expected = self.eager_dense(self.reference, self.images, "float32")
        limit = self.limit(expected)
        errors = {}
        for name, model in self.models.items():
            self.drop_grads()
            out = self.call(name, "forward_backward")().float()
            found = {"output": out if name.startswith("sparse") else self.rows(out), **measure.gradients(model)}
            errors[name] = measure.compare(f"{name} in {self.case.key}", found, expected, limit)
        self.drop_grads()
        return errors

    def limit(self, expected: dict[str, Tensor]) -> tuple[float, float]:
        """Return the largest error that an output and that a gradient may have.

        In float32 that is `measure.TOLERANCE`. In 16 bits it is the larger of the tolerance and the error of the
        eager dense encoder under the same autocast: rounding alone may bring that above the tolerance, and a sparse
        encoder has to be no worse than the dense one.

        Args:
            expected: output and gradients of the dense encoder in float32.
        """
        dtype, tolerance = self.case.dtype, measure.TOLERANCE[self.case.dtype]
        if dtype == "float32":
            return tolerance, tolerance
        dense = copy.deepcopy(self.reference).to(memory_format=torch.channels_last)
        found = self.eager_dense(dense, self.dense_images[False], dtype)
        error = measure.compare(f"dense in {self.case.key}", found, expected, math.inf)
        return max(tolerance, error["output"]), max(tolerance, error["gradient"])

    def eager_dense(self, model: ConvNeXtV2Encoder, images: Tensor, dtype: str) -> dict[str, Tensor]:
        """Return output rows and gradients of a dense encoder under autocast to `dtype`, by name."""
        with measure.autocast(self.case.device, dtype):
            out = masked_encoder(model, images, self.mask)
        out.backward(self.output_grad.to(out.dtype))
        found = {"output": self.rows(out.detach().float()), **measure.gradients(model)}
        model.zero_grad(set_to_none=True)
        return found

    def rows(self, dense: Tensor) -> Tensor:
        """Return the visible sites of the last stage as rows."""
        return SparseTensor.from_dense(dense, self.mask, self.case.visible).features

    def time(self, repeats: int) -> dict[str, dict[str, Any]]:
        """Return milliseconds of all variants, forward and forward + backward, see `measure.spread`."""
        result = {}
        for mode in ("forward", "forward_backward"):
            calls: dict[str, measure.Call] = {name: self.call(name, mode) for name in self.models}
            calls["floor"] = functools.partial(self.floor, mode == "forward_backward")
            result[mode] = measure.interleaved(calls, repeats, self.device, before=self.drop_grads)
        return result

    def anatomy(self, repeats: int) -> dict[str, Any]:
        """Return where forward + backward of the sparse encoder spend their time, on a CPU.

        A block is one operator, so its parts are timed alone: for each stage the `products` of its blocks, and their
        `depthwise` convolutions as modules. What is left of the blocks, `rest`, is elementwise work, Python and
        autograd. A difference of two times that comes out below 0 counts as 0.

        Returns:
            `measure.anatomy`, and in milliseconds, without the profiler, `encoder`: the whole; `stages`: of each all
            blocks together, and their parts; `downsampling`: the stem and the layers between stages; `outside`: what
            the encoder takes beside these, such as packing images.
        """
        model: Any = self.models["sparse"]
        case = self.case
        images = SparseTensor.from_dense(self.images, self.mask, case.visible)
        with torch.no_grad(), measure.autocast(case.device, case.dtype):
            stages = model.forward_features(images)
        for x in stages:  # Images alone need no gradient.
            x.features.requires_grad_()
        step = functools.partial(self.forward_backward, "sparse")
        down = self.alone(list(zip(model.downsample_layers, [images, *stages[:-1]], strict=True)))
        calls: dict[str, measure.Call] = {"encoder": step, "downsampling": down}
        for index, (stage, x) in enumerate(zip(model.stages, stages, strict=True)):
            calls[f"ms {index}"] = self.alone([(stage, x)])
            calls[f"products {index}"] = functools.partial(block_products(model, case, [index]), True)
            calls[f"depthwise {index}"] = self.alone([(block.dwconv, x) for block in stage])
        times = measure.interleaved(calls, repeats, self.device, before=self.drop_grads)
        ms = {name: found["median"] for name, found in times.items()}
        rows = []
        for index, (stage, x) in enumerate(zip(model.stages, stages, strict=True)):
            shape = {"channels": x.features.shape[1], "tile": x.layout.tile[0], "rows": x.layout.rows}
            parts = {name: ms[f"{name} {index}"] for name in ("ms", "products", "depthwise")}
            rest = max(0.0, round(parts["ms"] - parts["products"] - parts["depthwise"], 4))
            rows.append({**shape, "blocks": len(stage), **parts, "rest": rest})
        inside = ms["downsampling"] + sum(row["ms"] for row in rows)
        return {
            **measure.anatomy(step, repeats, before=self.drop_grads),
            "encoder": ms["encoder"],
            "stages": rows,
            "downsampling": ms["downsampling"],
            "outside": max(0.0, round(ms["encoder"] - inside, 4)),
        }

    def alone(self, layers: Sequence[tuple[torch.nn.Module, SparseTensor]]) -> Callable[[], None]:
        """Return a function that runs forward and backward of layers, each on an input of its own."""
        grads: list[Tensor] = []

        def run() -> None:
            for index, (layer, x) in enumerate(layers):
                leaf = x.features.detach().requires_grad_(x.features.requires_grad)
                with measure.autocast(self.case.device, self.case.dtype):
                    out = layer(SparseTensor(leaf, x.layout)).features
                if index == len(grads):  # in the first run, which is not timed
                    grads.append(torch.randn_like(out))
                out.backward(grads[index])

        return run

    def saved_bytes(self) -> dict[str, int]:
        """Return what autograd keeps for backward, by encoder."""
        inputs = [self.images, *self.dense_images.values(), self.mask]
        inputs += [parameter for model in self.models.values() for parameter in model.parameters()]
        return {name: measure.saved_bytes(functools.partial(self.encode, name), inputs) for name in self.eager}

    def peak_bytes(self) -> dict[str, int]:
        """Return the peak memory of forward + backward, by encoder."""
        if self.device.type == "cuda":
            return {name: measure.peak_bytes(functools.partial(steps, self, name), self.device) for name in self.eager}
        # The memory of a dense encoder does not depend on the mask, so one measurement serves all ratios.
        fixed = replace(self.case, ratio=0.0)
        cases = {name: self.case if name == "sparse" else fixed for name in self.eager}
        return {name: measure.in_fresh_process(cpu_peak_bytes, cases[name], name, self.by_block) for name in self.eager}

    def measured(self, repeats: int, anatomy: bool) -> dict[str, Any]:
        """Return the case with its errors, times and memory, and with the anatomy of the sparse encoder.

        Raises:
            Mismatch: the encoders differ; nothing was timed.
        """
        say("  compiling what is new, comparing outputs and gradients")
        errors = self.check()
        for name, error in errors.items():
            worst = f"gradients {error['gradient']:.1e} ({error['parameter']})"
            say(f"  {name}: relative error {error['output']:.1e}, {worst}")
        say(f"  timing, {repeats} repeats, then measuring memory")
        sites = {"visible": self.case.visible, "patches": self.case.grid[0] * self.case.grid[1]}
        found = {**asdict(self.case), **sites, "load": round(os.getloadavg()[0], 2), "errors": errors}
        found |= {"ms": self.time(repeats), "saved_bytes": self.saved_bytes(), "peak_bytes": self.peak_bytes()}
        return {**found, "anatomy": self.anatomy(repeats)} if anatomy else found


def masked_encoder(model: ConvNeXtV2Encoder, images: Tensor, mask: Tensor) -> Tensor:
    """Return the last stage `(B, C, h, w)`, computed densely."""
    return masked_dense.forward_features(model, images, mask)[-1]


def compiled_encoder(model: ConvNeXtV2Encoder, by_block: bool) -> Callable[..., Tensor]:
    """Return `masked_encoder` compiled as a whole, or block by block; then `model` is changed for good."""
    if not by_block:
        return torch.compile(masked_encoder, dynamic=False, fullgraph=True)
    torch._dynamo.config.recompile_limit = 64  # every stage has shapes of its own
    block = torch.compile(masked_dense.masked_block, dynamic=False, fullgraph=True)
    for layer in model.downsample_layers:
        layer.compile(dynamic=False, fullgraph=True)

    def run(model: ConvNeXtV2Encoder, images: Tensor, mask: Tensor) -> Tensor:
        with mock.patch.object(masked_dense, "masked_block", block):
            return masked_encoder(model, images, mask)

    return run


def randomize(model: torch.nn.Module) -> None:
    """Draw weights that keep every branch as large as its input, and leave nothing at 0 or 1.

    GRN starts at 0, where a wrong one would go unnoticed.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))


def block_products(
    model: ConvNeXtV2Encoder, case: Case, stages: Sequence[int] = (0, 1, 2, 3)
) -> Callable[[bool], None]:
    """Return a function that computes the matrix products of all blocks: with True six a block, else two of forward."""
    dtype, blocks = getattr(torch, case.dtype), []
    for index in stages:
        rows = case.batch * case.visible * (8 >> index) ** 2
        channels = model.dims[index]
        v, g = torch.randn(2, rows, channels, device=case.device).to(dtype)
        h, dh = torch.randn(2, rows, 4 * channels, device=case.device).to(dtype)
        stage: Any = model.stages[index]
        for block in stage:
            w1, w2 = block.pwconv1.weight.detach().to(dtype), block.pwconv2.weight.detach().to(dtype)
            forward = [(linear, v, w1), (linear, h, w2)]
            backward = [(linear, g, w2.T), (weight_grad, g, h), (linear, dh, w1.T), (weight_grad, dh, v)]
            blocks.append(forward + backward)

    @torch.no_grad()
    def floor(backward: bool) -> None:
        for products in blocks:
            for product, a, b in products[: 6 if backward else 2]:
                product(a, b)

    return floor


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Return `grad.T @ x`, over rows."""
    return torch.ops.sparsecnx.linear_weight_grad(grad, x) if x.device.type == "cpu" else grad.T @ x


def cpu_peak_bytes(case: Case, name: str, by_block: bool) -> int:
    """Return the peak memory of one encoder, in a fresh process."""
    # Memory that kernels keep from call to call counts, so one small image loads the libraries. Code that is compiled
    # for a shape has to run at that shape first; it keeps nothing.
    compiled = name.startswith("compiled")
    warm = Workload(case if compiled else replace(case, batch=1, image=STRIDE, ratio=0.0), [name], by_block)
    steps(warm, name)
    workload = warm if compiled else Workload(case, [name], by_block)
    return measure.peak_bytes(functools.partial(steps, workload, name), workload.device)


def steps(workload: Workload, name: str) -> None:
    """Run forward and backward twice."""
    for _ in range(2):
        workload.forward_backward(name)
        workload.drop_grads()


def selected_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases asked for, those that share a `Workload` one after another."""
    axes = list(SWEEPS) if options.sweep == "all" else [options.sweep] * (options.sweep is not None)
    grids = [argparse.Namespace(**{**vars(options), axis: SWEEPS[axis]}) for axis in axes] or [options]
    return sorted({case for grid in grids for case in measure.cases(grid)})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, VARIANTS)
    sweeps = "; ".join(f"{axis}: {' '.join(map(str, values))}" for axis, values in SWEEPS.items())
    help = f"these values in place of the option's own: {sweeps}"
    parser.add_argument("--sweep", choices=[*SWEEPS, "all"], help=help)
    parser.add_argument("--anatomy", action="store_true", help="also say where the sparse encoder spends its time")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw all of --out into this folder")
    options = measure.parse(parser, arguments)
    if options.plot and not options.out:
        parser.error("--plot draws what --out holds: give both")
    if options.anatomy and ("sparse" not in options.variants or torch.device(options.device).type != "cpu"):
        parser.error(
            f"--variants has {' '.join(options.variants)}, on {options.device}: --anatomy needs sparse, on a CPU"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    keep_freed_memory()
    workloads: list[Workload] = []

    def run(case: Case) -> dict[str, Any]:
        if workloads and replace(workloads[0].case, ratio=case.ratio) == case:
            workloads[0].set_ratio(case)
        else:
            workloads[:] = [Workload(case, options.variants, options.by_block)]
        return workloads[0].measured(options.repeats, options.anatomy)

    results = Results(options.out)
    failed = measure.run_cases(selected_cases(options), run, results, plots.print_tables)
    if options.plot and not failed:
        plots.draw(list(results.content["cases"].values()), options.plot)
    return failed


if __name__ == "__main__":
    sys.exit(main())
