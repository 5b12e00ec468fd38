"""Forward + backward of the masked encoder on a GPU: sparse against dense times the mask, compiled.

    python benchmarks/encoder_step.py --out encoder.json

Five variants, by autocast unless said otherwise, each in a process of its own (see steps.py):

    sparse        the sparse encoder, from images and mask: gathering pixels and neighbour tables are timed too
    sparse_graph  the same as a CUDA graph
    dense         all operators on the whole image, times the mask (`sparsecnx.models.masked_dense`), in
                  channels_last, every block and downsampling layer through torch.compile
    dense_whole   the same with the whole encoder through torch.compile at once
    dense_cast    as dense, weights and images in the low precision throughout, without autocast

The dense ones get their images, and with them the mask, in the low precision, and pick their convolutions by
`torch.backends.cudnn.benchmark`. The batch is the largest that dense has memory for. Compiling whole takes
minutes at the depth of Base, so that comes last; it runs the same kernels but for what is fused across blocks.

Correctness, `errors`: of sparse, the output and all parameter gradients of a few images against the dense encoder
in float32, as in encoder.py; of the graph, its output and gradients against running it without; of dense, its
output against the eager dense encoder. Where they are above `encoder.TOLERANCE` the case says `agrees: false`, and
the benchmark fails, but its time is measured.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import encoder
import steps
import torch
from steps import Runner, Step, Variant
from torch import Tensor

from sparsecnx import random_mask
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES, ConvNeXtV2Encoder
from sparsecnx.models.convnextv2 import STRIDE
from sparsecnx.ops.block import operator as block_operator
from sparsecnx.tensor import SparseTensor

CHECKED = 4  # images whose outputs and gradients are compared in float32
NAMES = ("dense", "sparse", "sparse_graph", "dense_cast", "dense_whole")
KEPT = 14  # values kept by the compiled dense encoder per site and channel of a block, for a first guess of what fits


class Work:
    """Images, mask and weights of a case at a batch size, the same in every process."""

    def __init__(self, case: dict[str, Any], batch: int) -> None:
        torch.manual_seed(0)
        self.case, self.batch = case, batch
        self.device = torch.device(case["device"])
        self.dtype = getattr(torch, case["dtype"])
        size, side = SIZES[case["size"]], case["image"] // STRIDE
        self.visible = visible_count(side * side, case["ratio"])
        torch.backends.cudnn.allow_tf32 = False  # what is checked against is float32
        with self.device:  # drawing Huge's weights takes a CPU half a minute
            self.model = ConvNeXtV2Encoder(size.depths, size.dims)
        encoder.randomize(self.model)
        # Drawn on the CPU: the same on every device, and the first images the same at every batch.
        generator = torch.Generator().manual_seed(0)
        mask = random_mask(batch, (side, side), case["ratio"], generator=generator)
        self.mask = mask.view(batch, side, side).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        images = torch.randn(batch, 3, case["image"], case["image"], generator=generator, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        grad = torch.randn(batch, size.dims[-1], side, side, generator=generator, device=self.device)
        self.grad = grad.to(memory_format=torch.channels_last)

    def sparse(self, images: Tensor, mask: Tensor) -> SparseTensor:
        """The last stage's SparseTensor, under autocast."""
        with steps.autocast(self.case["device"], self.case["dtype"]):
            return self.model(images, mask, self.visible)

    def rows(self, dense: Tensor, mask: Tensor) -> Tensor:
        """The visible sites of a dense last stage, as rows."""
        return SparseTensor.from_dense(dense.float(), mask, self.visible).features


def sparse(case: dict[str, Any], graph: bool, batch: int) -> Step:
    """The sparse encoder; as a graph, held against itself without."""
    work = Work(case, batch)
    grad = work.rows(work.grad, work.mask)
    low = grad.to(work.dtype)
    out: list[Tensor] = []

    def forward() -> Tensor:
        return work.sparse(work.images, work.mask).features

    def run() -> None:
        out[:] = [forward()]
        out[0].backward(low.to(out[0].dtype))
        out[0] = out[0].detach()

    check = functools.partial(graph_errors, work, out, low) if graph else functools.partial(sparse_errors, work)
    inputs = [work.images, work.mask, *work.model.parameters()]
    return Step(run, steps.dropping(work.model), inputs, check, forward)


def sparse_errors(work: Work) -> dict[str, Any]:
    """Errors of the sparse encoder on the first images against the dense one in float32."""
    images, mask, grad = work.images[:CHECKED], work.mask[:CHECKED], work.grad[:CHECKED]
    backend = block_operator.choose(work.sparse(images, mask))
    work.model.zero_grad(set_to_none=True)
    out = encoder.dense_encoder(work.model, images, mask)
    out.backward(grad)
    expected = {"output": work.rows(out.detach(), mask), **encoder.grads_by_name(work.model)}
    work.model.zero_grad(set_to_none=True)
    features = work.sparse(images, mask).features
    features.backward(work.rows(grad, mask).to(features.dtype))
    found = {"output": features.detach().float(), **encoder.grads_by_name(work.model)}
    work.model.zero_grad(set_to_none=True)
    return {"backend": backend, **judged(found, expected, work.case)}


def graph_errors(work: Work, out: list[Tensor], grad: Tensor) -> dict[str, Any]:
    """Errors of what the replayed graph has just written against the same step, with that gradient, run eagerly."""
    found = {"output": out[0].clone(), **{k: v.clone() for k, v in encoder.grads_by_name(work.model).items()}}
    held = {name: parameter.grad for name, parameter in work.model.named_parameters()}
    work.model.zero_grad(set_to_none=True)
    features = work.sparse(work.images, work.mask).features
    features.backward(grad.to(features.dtype))
    expected = {"output": features.detach().float(), **encoder.grads_by_name(work.model)}
    for name, parameter in work.model.named_parameters():
        parameter.grad = held[name]  # where the graph writes
    return judged(found, expected, work.case)


def dense(case: dict[str, Any], whole: bool, cast: bool, batch: int) -> Step:
    """The dense encoder, compiled: whole or block by block; with weights in the low precision, or by autocast."""
    work = Work(case, batch)
    model = work.model.to(memory_format=torch.channels_last)
    if cast:
        model.to(work.dtype)
    torch.backends.cudnn.benchmark = True
    function = encoder.dense_encoder
    if whole:
        function = steps.compiled(function, case)
    else:
        steps.compile_blocks(model, case)
    images = work.images.to(work.dtype)
    grad = work.grad.to(work.dtype)
    dtype = "float32" if cast else case["dtype"]
    first: list[Tensor] = []

    def forward() -> Tensor:
        with steps.autocast(case["device"], dtype):
            return function(model, images, work.mask)

    def run() -> None:
        out = forward()
        out.backward(grad.to(out.dtype))
        first[:] = [out.detach()[:CHECKED].clone()]

    def check() -> dict[str, Any]:
        few, mask = images[:CHECKED], work.mask[:CHECKED]
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.no_grad(), steps.autocast(case["device"], dtype):
            expected = encoder.dense_encoder(model, few, mask)
        return judged({"output": first[0].float()}, {"output": expected.float()}, case)

    return Step(run, steps.dropping(model), [images, work.mask, *model.parameters()], check, forward)


def judged(found: dict[str, Tensor], expected: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Any]:
    """Relative errors, of the output and the largest of the gradients, and whether they are within tolerance."""
    by_name = {name: encoder.relative_error(value, expected[name].float()) for name, value in found.items()}
    errors: dict[str, Any] = {"output": by_name.pop("output")}
    if by_name:
        worst = max(by_name, key=lambda name: (math.isnan(by_name[name]), by_name[name]))
        errors |= {"gradient": by_name[worst], "parameter": worst}
    limit = encoder.TOLERANCE[case["dtype"]]
    agrees = all(error <= limit for error in errors.values() if isinstance(error, float))
    return {"errors": errors, "agrees": agrees}


def bytes_per_image(size: str, image: int, dtype: str) -> float:
    """What the dense encoder is expected to keep for backward, for a first guess of the batch that fits."""
    depths, dims = SIZES[size].depths, SIZES[size].dims
    sites = [(image // (4 << stage)) ** 2 for stage in range(len(dims))]
    values = sum(depth * dim * count for depth, dim, count in zip(depths, dims, sites, strict=True))
    return float(KEPT * values * getattr(torch, dtype).itemsize)


def variants(case: dict[str, Any]) -> dict[str, Variant]:
    """All variants of a case, by name."""
    builds = {
        "dense": functools.partial(dense, case, False, False),
        "sparse": functools.partial(sparse, case, False),
        "sparse_graph": functools.partial(sparse, case, True),
        "dense_cast": functools.partial(dense, case, False, True),
        "dense_whole": functools.partial(dense, case, True, False),
    }
    return {name: Variant(name, case, build, graph=name == "sparse_graph") for name, build in builds.items()}


def main(given: Sequence[str] | None = None) -> int:
    parser = steps.arguments("Time the encoder's forward + backward, sparse against dense.", list(SIZES))
    steps.add_choices(parser)
    parser.add_argument("--variants", nargs="+", choices=NAMES, help="by default all that the device can run")
    options = steps.parsed(parser, given)
    device = steps.facts(options.device)
    names = options.variants or [name for name in NAMES if name != "sparse_graph" or device["name"] != "cpu"]
    runner = Runner(options.out, options.deadline, options.repeat_seconds, options.limit)
    batches: dict[str, list[int]] = {}
    # First, of all sizes, what the comparison needs; then how much more the baseline could be helped.
    for group in (["dense", "sparse", "sparse_graph"], ["dense_cast"], ["dense_whole"]):
        for size in options.size:
            case = steps.settings(options, size)
            if size not in batches:
                per_image = bytes_per_image(size, options.image, options.dtype)
                batches[size] = steps.batches_to_try(options.batch, per_image, device["memory_bytes"])
            for name in (name for name in group if name in names):
                fits = runner.measure(variants(case)[name], batches[size])
                if name == "dense" and fits is not None:
                    batches[size] = [fits]
    return int(runner.failed)


if __name__ == "__main__":
    sys.exit(main())
