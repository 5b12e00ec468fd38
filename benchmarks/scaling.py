"""PREDICT how FCMAE pretraining scales over H100 GPUs, from counted FLOPs and bytes. Nothing here was timed on a GPU.

    python benchmarks/scaling.py --size atto tiny base huge --gpus 1 8 64 --out scaling.json

Counted on a CPU, with one and with two images, which gives any batch because every count is linear in it: the FLOPs of
each operator of forward and backward, by the formulas of `torch.utils.flop_counter`, and its bytes, those of its
operands and results. The layers of a block are counted one by one; the fused kernels move less. Assumed: `HARDWARE` and
`SHARE`. An operator takes the longest of its FLOPs, its bytes and a launch. A step takes its operators and AdamW, and
between all of the communication (nothing hidden behind computing) and what is longer than computing (all hidden).
docs/dev/scaling.md says what that leaves out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sparsecnx.models import SIZES, create_fcmae

GPUS_PER_NODE = 8
# An H100 SXM does this much in a second: dense bfloat16 products, memory, one direction of NVLink and of InfiniBand.
HARDWARE = {"flops": 989e12, "memory": 3.35e12, "nvlink": 450e9, "network": 50e9}
SHARE = {"flops": 0.4, "memory": 0.7, "nvlink": 0.8, "network": 0.8}  # what is reached of it; an assumption
LAUNCH = 5e-6  # seconds for a kernel that has nothing to do; an assumption
RATES = {name: HARDWARE[name] * SHARE[name] for name in HARDWARE}
STATE = 16  # bytes per parameter: weight, gradient and AdamW's two moments, in float32
ADAMW = 28  # bytes per parameter that AdamW moves: reads all four, writes all but the gradient


HEADINGS = ("communication, ms", "images/s", "of linear", "state, GiB")

# These reserve memory and touch none of it. Some happen once and are cached.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Work(NamedTuple):
    """The work of one operator: its FLOPs, and the values that it reads and writes."""

    flops: float
    values: float


class Counter(TorchDispatchMode):
    """Notes the work of every operator but those that reserve memory, or look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            {id(t): t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()}.values()
            for value in ((args, kwargs), out)
        )
        storages = {tensor.untyped_storage().data_ptr() for tensor in read}
        view = all(tensor.untyped_storage().data_ptr() in storages for tensor in written)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        if flops or (written and not view and func._overloadpacket.__name__ not in ALLOCATIONS):
            self.operators.append(Work(flops, sum(tensor.numel() for tensor in (*read, *written))))
        return out


def counted(size: str, ratio: float, image: int) -> tuple[int, tuple[list[Work], list[Work]]]:
    """Return the parameters of FCMAE, and the work of its forward and backward with one and with two images."""
    model = create_fcmae(size)
    one_by_one = register_module_forward_hook(lambda *_: None)  # A block with a hook does not run fused.
    works = []
    for batch in (1, 2):
        images = torch.randn(batch, 3, image, image)
        with Counter() as counter:
            model(images, mask_ratio=ratio)[0].backward()
        model.zero_grad(set_to_none=True)
        works.append(counter.operators)
    one_by_one.remove()
    if len(works[0]) != len(works[1]):
        raise measure.Mismatch(f"{size}: {len(works[0])} operators for one image, {len(works[1])} for two")
    return sum(p.numel() for p in model.parameters()), (works[0], works[1])


def computing(works: tuple[list[Work], list[Work]], batch: float) -> dict[str, float]:
    """Return FLOPs and bytes of a step of `batch` images on one GPU, and its seconds, without optimizer and network."""
    found = {"flops": 0.0, "bytes": 0.0, "seconds": 0.0}
    for one, two in zip(*works, strict=True):
        flops, values = (a + (b - a) * (batch - 1) for a, b in zip(one, two, strict=True))
        found["flops"] += flops
        found["bytes"] += 2 * values  # bfloat16
        found["seconds"] += max(flops / RATES["flops"], 2 * values / RATES["memory"], LAUNCH)
    return found


def collecting(size: float, gpus: int) -> float:
    """Return the seconds in which `gpus` gather, or reduce and scatter, `size` bytes: inside nodes, and between them.

    Each GPU of a node exchanges its part of the bytes with its peers in the other nodes, through its own port.
    """
    inside = min(gpus, GPUS_PER_NODE)
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    return size * (1 - 1 / inside) / RATES["nvlink"] + size / inside * (1 - 1 / nodes) / RATES["network"]


def predicted(parameters: int, works: tuple[list[Work], list[Work]], batch: int, gpus: int) -> dict[str, Any]:
    """Return what a step of `batch` images on `gpus` GPUs takes, by DDP and by FSDP2.

    Speeds are pairs, with no communication hidden and with all of it; `of_linear` is them by those of as many GPUs of
    which each takes a step of `batch` images alone.
    """
    step = computing(works, batch / gpus)
    alone = computing(works, batch)["seconds"] + ADAMW * parameters / RATES["memory"]
    parts = {
        # DDP: all-reduce of float32 gradients. FSDP2: all-gather of float32 weights, which autocast narrows afterwards,
        # in forward and again in backward, and reduce-scatter of float32 gradients.
        "ddp": (2 * collecting(4 * parameters, gpus), 1),
        "fsdp2": (3 * collecting(4 * parameters, gpus), gpus),
    }
    found: dict[str, Any] = {"predicted": True, "gpus": gpus, "batch": batch, "parameters": parameters, **step}
    for name, (network, shards) in parts.items():
        local = step["seconds"] + ADAMW * parameters / shards / RATES["memory"]
        speeds = [batch / (local + network), batch / max(local, network)]
        found[name] = {
            "state_bytes": STATE * parameters / shards,
            "network_seconds": network,
            "images_per_s": speeds,
            "of_linear": [speed * alone / (gpus * batch) for speed in speeds],
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--size", nargs="+", choices=list(SIZES), default=["atto", "tiny", "base", "huge"], metavar="NAME"
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64], help=f"in nodes of {GPUS_PER_NODE}")
    parser.add_argument("--batch", type=int, default=4096, help="images of a step, on all GPUs together")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args(arguments)
    for gpus in options.gpus:
        if gpus < 1 or options.batch % gpus or (gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE):
            parser.error(f"--gpus is {gpus}: expected whole nodes of {GPUS_PER_NODE}, or fewer, that divide --batch")
    results, rows = measure.Results(options.out), []
    for size in options.size:
        measure.say(f"counting {size}")
        parameters, works = counted(size, options.ratio, options.image)
        for gpus in options.gpus:
            case = predicted(parameters, works, options.batch, gpus)
            results.add(f"{size}-{gpus}gpus", {**case, "size": size, "ratio": options.ratio, "image": options.image})
            rows.append(_row(size, case))
    head = ["PREDICTED", "GPUs", "GFLOP / image", "MB / image", "computing, ms"]
    head += [f"{name}: {what}" for name in ("DDP", "FSDP2") for what in HEADINGS]
    measure.print_table(head, rows)
    return 0


def _row(size: str, case: dict[str, Any]) -> list[object]:
    images = case["batch"] / case["gpus"]
    row = [size, case["gpus"], case["flops"] / images / 1e9, case["bytes"] / images / 1e6]
    row += [1e3 * case["seconds"]]
    for name in ("ddp", "fsdp2"):
        found = case[name]
        slow, fast = (float(f"{speed:.3g}") for speed in found["images_per_s"])
        low, high = found["of_linear"]
        several = case["gpus"] > 1
        row += [1e3 * found["network_seconds"]]
        row += [f"{slow:,.0f} to {fast:,.0f}" if several else f"{slow:,.0f}"]
        row += [f"{low:.2f} to {high:.2f}" if several else "1", found["state_bytes"] / 2**30]
    return row


if __name__ == "__main__":
    sys.exit(main())
