"""Bytes and FLOPs of a block, forward and backward, counted: sparse by kernel, and dense times mask compiled.

    python benchmarks/counts.py --out benchmarks/results/counts.json --table

Needs no GPU: nothing is timed. Sparse: every launch of the fused block's Triton operators, and torch's matrix
products, costed by kernel_costs.py. Dense: `masked_dense.masked_block` through torch.compile, bytes as inductor counts
them for the kernels it made, and the FLOPs of its six matrix products. Each is counted at two batch sizes; the
difference is what a row costs, whatever the weights cost beside it. Widths are in values of C: a row of x read once is
1 C. Kept is what autograd saves for backward.

The floor of a kernel is the larger of bytes / bandwidth and FLOPs / rate, at rates given on the command line; the
defaults are round numbers for an H200 in bfloat16. They are assumptions, not measurements. Of the dense block only the
whole is known: its floor is the larger of all bytes and all FLOPs, less than the sum over its kernels would be.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernel_costs
import torch
from kernel_costs import Cost
from kernels import programs
from measure import saved_bytes
from record import Results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsecnx import use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES, masked_dense
from sparsecnx.models.convnextv2 import STRIDE
from sparsecnx.nn import ConvNeXtV2Block
from sparsecnx.ops.block import triton_kernels as block_room

TILES = (8, 4, 2, 1)
BATCHES = (2, 4)
PRODUCTS = 6  # of a block: two forward, four backward, 2 * 4C * C FLOPs a site each


class Products(TorchDispatchMode):
    """Costs of the matrix products that torch runs."""

    def __init__(self, costs: dict[str, Cost]) -> None:
        super().__init__()
        self.costs = costs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        definition = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if definition is not None:
            with self:
                return definition._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::mm":
            add(self.costs, "torch.mm", kernel_costs.operator_cost("torch.mm", tree_leaves(args), tree_leaves(out)))
        return out


def add(costs: dict[str, Cost], name: str, cost: Cost) -> None:
    before = costs.get(name, Cost(0))
    costs[name] = Cost(before.bytes + cost.bytes, before.matrix + cost.matrix, before.vector + cost.vector)


def sparse(size: str, stage: int, ratio: float, image: int, batch: int) -> tuple[dict[str, Cost], int]:
    """Costs of a block of a stage by kernel, and the bytes it keeps for backward."""
    costs: dict[str, Cost] = {}

    def observe(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        name, by_name = kernel_costs.bound(kernel, arguments, options)
        if name == "hidden_backward_kernel":
            name += ", gradients" if by_name["GRADIENTS"] else ", sums"
        elif name == "depthwise_conv_kernel":
            name += ", gradient of x" if by_name["FLIP"] else ", forward"
        add(costs, name, kernel_costs.cost(kernel, arguments, options))

    channels = SIZES[size].dims[stage - 1]
    case = {"device": "cpu", "dtype": "bfloat16", "channels": channels, "tile": TILES[stage - 1], "stage": stage}
    case |= {"image": image, "ratio": ratio}
    with triton_launch.observing(observe), use_backend("triton"):
        run = programs(case, batch)["block"]()
        costs.clear()  # of the forward pass that sets the gradient's shape
        with Products(costs):
            kept = saved_bytes(run, ())
    return costs, kept


def sparse_per_row(size: str, stage: int, ratio: float, image: int) -> tuple[dict[str, dict[str, float]], float]:
    """What each kernel of a block costs per row, `bytes`, `matrix` and `vector` FLOPs, and the bytes kept per row."""
    rows = visible_count((image // STRIDE) ** 2, ratio) * TILES[stage - 1] ** 2
    (few, kept_by_few), (more, kept) = (sparse(size, stage, ratio, image, batch) for batch in BATCHES)
    steps = rows * (BATCHES[1] - BATCHES[0])
    parts = ("bytes", "matrix", "vector")
    costs = {
        name: {part: (getattr(more[name], part) - getattr(few[name], part)) / steps for part in parts} for name in more
    }
    return costs, (kept - kept_by_few) / steps


def dense_per_site(channels: int, side: int) -> tuple[float, float]:
    """Bytes that the compiled dense block moves and keeps per site, forward and backward, bfloat16, channels_last."""
    few, more = (dense(channels, side, batch) for batch in BATCHES)
    sites = side * side * (BATCHES[1] - BATCHES[0])
    return (more[0] - few[0]) / sites, (more[1] - few[1]) / sites


def dense(channels: int, side: int, batch: int) -> tuple[int, int]:
    """Bytes moved, as inductor counts them, and bytes kept for backward."""
    from torch._inductor import metrics

    torch.compiler.reset()
    metrics.reset()
    block = ConvNeXtV2Block(channels).to(torch.bfloat16).to(memory_format=torch.channels_last)
    shape = (batch, channels, side, side)
    x = torch.randn(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    active = (torch.rand(batch, 1, side, side) < 0.4).to(torch.bfloat16)
    compiled = torch.compile(masked_dense.masked_block, dynamic=False, fullgraph=True)
    outputs: list[Tensor] = []
    kept = saved_bytes(lambda: outputs.append(compiled(block, x, active)), block.parameters())
    outputs[0].backward(torch.randn_like(outputs[0]))
    if not metrics.num_bytes_accessed:
        raise RuntimeError("inductor counted no bytes: its metrics are off in this version of torch")
    return metrics.num_bytes_accessed, kept


def floor(cost: dict[str, float], options: argparse.Namespace) -> float:
    """Nanoseconds per row below which no kernel gets at the assumed rates."""
    return 1e9 * max(
        cost["bytes"] / options.bandwidth, cost["matrix"] / options.matrix_rate, cost["vector"] / options.vector_rate
    )


def count(options: argparse.Namespace) -> dict[str, Any]:
    """The case of a model: every stage, and all blocks together."""
    size = SIZES[options.size]
    side = options.image // STRIDE
    visible = visible_count(side * side, options.ratio) / side**2
    stages = []
    for stage, channels in enumerate(size.dims, 1):
        costs, kept = sparse_per_row(options.size, stage, options.ratio, options.image)
        for cost in costs.values():
            cost["C"] = cost["bytes"] / (2 * channels)
            cost["floor_ns"] = floor(cost, options)
        moved, dense_kept = dense_per_site(channels, side * TILES[stage - 1])
        products = PRODUCTS * 2 * 4 * channels**2
        stages.append(
            {
                "stage": stage,
                "channels": channels,
                "blocks": size.depths[stage - 1],
                "kernels": {
                    name: {part: round(value, 3) for part, value in cost.items()} for name, cost in costs.items()
                },
                "sparse_C": round(sum(cost["C"] for cost in costs.values()), 2),
                "sparse_kept_C": round(kept / (2 * channels), 2),
                "sparse_floor_ns": round(sum(cost["floor_ns"] for cost in costs.values()), 3),
                "dense_C": round(moved / (2 * channels), 2),
                "dense_kept_C": round(dense_kept / (2 * channels), 2),
                "dense_floor_ns": round(floor({"bytes": moved, "matrix": products, "vector": 0}, options), 3),
            }
        )
    sites = [depth * (side * tile) ** 2 for depth, tile in zip(size.depths, TILES, strict=True)]

    def total(field: str, by_width: bool = False) -> float:
        widths = [stage["channels"] if by_width else 1 for stage in stages]
        return sum(n * width * stage[field] for n, width, stage in zip(sites, widths, stages, strict=True))

    return {
        "size": options.size,
        "ratio": options.ratio,
        "image": options.image,
        "assumed": {
            "bandwidth": options.bandwidth,
            "matrix_rate": options.matrix_rate,
            "vector_rate": options.vector_rate,
        },
        "stages": stages,
        "sparse_floor_us_per_image": round(visible * total("sparse_floor_ns") / 1e3, 2),
        "dense_floor_us_per_image": round(total("dense_floor_ns") / 1e3, 2),
        "floor_ratio": round(visible * total("sparse_floor_ns") / total("dense_floor_ns"), 4),
        "kept_ratio": round(visible * total("sparse_kept_C", True) / total("dense_kept_C", True), 4),
    }


def table(case: dict[str, Any]) -> str:
    """The case as a markdown table."""
    stages = case["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["kernels"]))
    lines = ["| per row, values of C moved (floor, ns) | " + " | ".join(f"C = {s['channels']}" for s in stages) + " |"]
    lines.append("|---" * (len(stages) + 1) + "|")
    for name in names:
        found = [stage["kernels"].get(name) for stage in stages]
        cells = [f"{cost['C']:.1f} ({cost['floor_ns']:.2f})" if cost else "" for cost in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for label, width, time in (
        ("**sparse, all kernels**", "sparse_C", "sparse_floor_ns"),
        ("**dense, compiled, per site**", "dense_C", "dense_floor_ns"),
    ):
        lines.append(f"| {label} | " + " | ".join(f"{s[width]:.1f} ({s[time]:.2f})" for s in stages) + " |")
    for label, width in (("kept for backward, sparse", "sparse_kept_C"), ("kept for backward, dense", "dense_kept_C")):
        lines.append(f"| {label} | " + " | ".join(f"{s[width]:.1f}" for s in stages) + " |")
    return "\n".join(lines)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--bandwidth", type=float, default=4.0e12, help="bytes per second (default: %(default)g)")
    parser.add_argument("--matrix-rate", type=float, default=7.9e14, help="FLOP/s of products (default: %(default)g)")
    parser.add_argument("--vector-rate", type=float, default=6.0e13, help="FLOP/s otherwise (default: %(default)g)")
    parser.add_argument(
        "--recompute-channels",
        type=int,
        metavar="C",
        help="recompute the hidden layer up to this width (default: the rule)",
    )
    parser.add_argument("--out", type=Path, help="results file to add the case to")
    parser.add_argument("--table", action="store_true", help="print a markdown table")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    if options.recompute_channels is not None:
        block_room.RECOMPUTE_CHANNELS = options.recompute_channels
    torch._logging.set_logs(inductor_metrics=True)  # only then does inductor count
    logging.getLogger("torch._inductor").handlers.clear()
    torch._inductor.config.force_disable_caches = True
    case = count(options)
    if options.out:
        Results(options.out).add(f"{options.size}-mask{options.ratio:g}-{options.image}px", case)
    if options.table:
        print(table(case))
    print(
        f"{options.size}: floor of the sparse blocks {case['sparse_floor_us_per_image']} us an image, "
        f"{case['floor_ratio']:.2f} of the compiled dense blocks'; kept for backward {case['kept_ratio']:.3f} of theirs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
