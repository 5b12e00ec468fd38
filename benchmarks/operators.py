"""Time operators of torch on a SparseTensor, and on the whole images with the mask multiplied after them, on a CPU.

    python benchmarks/operators.py --out operators.json
    python benchmarks/operators.py --operators conv3x3 batch_norm --repeats 21

Each module of torch runs forward and backward on a SparseTensor, and on a dense tensor of the same extent, in NCHW and
in channels_last, of which the faster counts. Widths and tiles are those of known networks for images of 224 pixels.
Batch 8, float32, one thread; the times are CPU times, taken in turn, of which the least counts, since other processes
only add to them. `kernel_map` builds the two tables of a 3x3 convolution for a new mask, beside the dense convolution.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Call, Results, interleaved, print_table, say
from torch import Tensor, nn

from sparsecnx import Layout, SparseTensor, random_mask

GRIDS = {1: (49,), 2: (7, 7), 3: (4, 4, 4)}  # of patches
RESNET = {8: 64, 4: 128, 2: 256, 1: 512}  # channels of the 3x3 convolutions at tiles of so many sites
WIDE = {32: 32, 16: 64, 8: 256, 4: 512, 2: 1024, 1: 2048}
CONVNEXT = {8: 96, 4: 192, 2: 384, 1: 768}
UNET = {8: 32, 4: 64}  # of volumes
KERNEL_MAP = "kernel_map"

# Each operator: its dimensions of space, the module for so many channels, and the channels by side of the tile.
OPERATORS: dict[str, tuple[int, Callable[[int], nn.Module], dict[int, int]]] = {
    "conv1x1": (2, lambda c: nn.Conv2d(c, c, 1, bias=False), WIDE),
    "conv3x3": (2, lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False), RESNET),
    "conv3x3/2": (2, lambda c: nn.Conv2d(c, c, 3, 2, 1, bias=False), {8: 128, 4: 256, 2: 512}),
    "conv3x3-groups-of-8": (2, lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c // 8, bias=False), RESNET),
    "conv7x7-depthwise": (2, lambda c: nn.Conv2d(c, c, 7, padding=3, groups=c), CONVNEXT),
    "conv2x2/2-transposed": (2, lambda c: nn.ConvTranspose2d(c, c // 2, 2, 2), {4: 128, 2: 256, 1: 512}),
    "conv3x3x3": (3, lambda c: nn.Conv3d(c, c, 3, padding=1, bias=False), UNET),
    "batch_norm": (2, nn.BatchNorm2d, WIDE),
    "instance_norm": (2, lambda c: nn.InstanceNorm2d(c, affine=True), {16: 64, 8: 256, 4: 512, 2: 1024}),
    "group_norm": (2, lambda c: nn.GroupNorm(32, c), WIDE),
    "max_pool3x3/2": (2, lambda _: nn.MaxPool2d(3, 2, 1), {16: 64}),
    "max_pool2x2x2/2": (3, lambda _: nn.MaxPool3d(2), UNET),
    "max_pool3/2": (1, lambda _: nn.MaxPool1d(3, 2, 1), {64: 64}),
    "avg_pool3x3": (2, lambda _: nn.AvgPool2d(3, 1, 1), RESNET),
    "avg_pool2x2/2": (2, lambda _: nn.AvgPool2d(2), {8: 256, 4: 512, 2: 1024}),
    KERNEL_MAP: (2, lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False), RESNET),
}


def forward_and_backward(module: Callable[[Any], Any], x: Any, leaves: Sequence[Tensor]) -> Call:
    """Return a call of a module, and of its gradients with respect to the leaves."""
    grads: list[Tensor] = []

    def run() -> None:
        out = module(x)
        out = out.features if isinstance(out, SparseTensor) else out
        if not grads:
            grads.append(torch.randn_like(out))
        torch.autograd.grad(out, leaves, grads[0])

    return run


def calls(name: str, tile: int, batch: int, ratio: float) -> tuple[dict[str, Call], dict[str, Any]]:
    """Return what is timed for an operator at a side of the tile, and the facts of the case."""
    ndim, make, channels = OPERATORS[name]
    module, grid, kernel = make(channels[tile]), GRIDS[ndim], (3,) * ndim
    shape = tuple(size * tile for size in grid)
    mask = random_mask(batch, grid, ratio, generator=torch.Generator().manual_seed(0)).view(batch, *grid)
    parameters = list(module.parameters())
    images = torch.randn(batch, channels[tile], *shape)
    packed = SparseTensor.from_dense(images, mask)
    x = packed.with_features(packed.features.clone().requires_grad_())

    def tables() -> None:
        layout = Layout.from_mask(mask, shape)
        layout.kernel_map(kernel, (1,) * ndim, (1,) * ndim, (1,) * ndim)
        layout.inverse_map(kernel, (1,) * ndim, (1,) * ndim, (1,) * ndim)

    timed = {"sparse": tables if name == KERNEL_MAP else forward_and_backward(module, x, [x.features, *parameters])}
    out: SparseTensor = module(x)
    visible = out.with_features(out.features.detach().new_ones(out.features.shape[0], 1)).dense()
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    for layout in ("contiguous", "channels_last") if ndim in formats else ("contiguous",):
        to = formats[ndim] if layout == "channels_last" else torch.contiguous_format
        dense = images.to(memory_format=to).clone(memory_format=torch.preserve_format).requires_grad_()
        timed[layout] = forward_and_backward(lambda value: module(value) * visible, dense, [dense, *parameters])
    return timed, {"operator": name, "tile": tile, "channels": channels[tile], "rows": x.layout.rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.6, help="mask ratio, in [0, 1)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results, rows = Results(options.out), []
    for name in options.operators:
        for tile in OPERATORS[name][2]:
            say(f"{name}, tile {tile}")
            timed, facts = calls(name, tile, options.batch, options.ratio)
            ms = interleaved(timed, options.repeats, torch.device("cpu"), clock="process")
            dense = min((found["min"] for key, found in ms.items() if key != "sparse"), default=math.nan)
            sparse = ms["sparse"]["min"]
            results.add(f"{name}-tile{tile}", {**facts, "ms": ms})
            rows.append([name, tile, facts["channels"], facts["rows"], sparse, dense, sparse / dense])
    print_table(["operator", "tile", "channels", "rows", "sparse, ms", "dense x mask, ms", "sparse / dense"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
