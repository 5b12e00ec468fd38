"""Time networks of volumes on a SparseTensor against the same networks dense, times the mask.

    python benchmarks/volumes.py --out benchmarks/results/volumes-cpu.json
    python benchmarks/volumes.py --cases resenc --threads 1 --repeats 3 --clock process --variants sparse dense

Cases, each with the sides of its volume and blocks and with the fraction that is visible:

    resenc        encoder of nnU-Net's ResidualEncoderUNet (ResEnc L), stride 32, dense below the blocks as in nnssl;
                  from dynamic-network-architectures
    stunet        encoder of STU-Net base as AnatoMask has it, stride 16
    fcmae         FCMAE with ConvNeXt V2 Atto, kernels 7x7x7, to its loss
    fcmae_16      likewise, with a stem of 2 and patches of 16
    depthwise_7   a depthwise convolution 7x7x7 of 32 channels, with the gradient of its input; packing is not timed
    depthwise_3   likewise 3x3x3
    conv_3        likewise a convolution 3x3x3 of 32 channels
    block         likewise a ConvNeXt V2 block of 32 channels with a kernel 7x7x7

Each runs forward and backward in training mode, to the gradients of all parameters. Variants:

    sparse        the network on a SparseTensor; packing the volumes is timed too
    dense         every convolution and norm on the whole volume, then times the mask, as nnssl and AnatoMask do;
                  instance norm takes its statistics from the visible sites by masked sums
    compiled      `dense` through torch.compile
    *_contiguous  with contiguous volumes and weights; those of the others are channels_last_3d

Before anything is timed, outputs and gradients of `sparse` and `dense` are compared in float64. The geometry is the
list of the visible tiles and their neighbours; convolutions and poolings keep nothing else (tests/ops/test_conv.py).
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Results, say
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from sparsecnx import SparseTensor, TileSet
from sparsecnx.geometry.masks import random_mask, visible_count
from sparsecnx.models import FCMAE, create_fcmae, masked_dense
from sparsecnx.nn import ConvNeXtV2Block

DENSE = ("dense", "compiled", "dense_contiguous", "compiled_contiguous")
VARIANTS = ("sparse", *DENSE)
DOUBLE_LIMIT, FLOAT_LIMIT = 1e-8, 1e-3
LEAST = 1e-6  # smaller gradients, relative to the largest, are sums that cancel
MEMORY_GOAL = 1.15  # times the visible fraction of what the least of the dense variants keeps


@dataclass(frozen=True)
class Case:
    """One network at one setting. `goal` is the most that its time may be, relative to the best dense variant."""

    name: str
    side: int
    patch: int
    ratio: float
    goal: float
    batch: int = 1
    threads: int = 2

    @property
    def key(self) -> str:
        return f"{self.name}-{self.side}^3-patch{self.patch}-mask{self.ratio:g}-batch{self.batch}-{self.threads}threads"

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.side // self.patch,) * 3

    @property
    def visible(self) -> int:
        return visible_count(math.prod(self.grid), self.ratio)


CASES = {
    case.name: case
    for case in (
        Case("resenc", 64, 16, 0.75, 0.28),
        Case("stunet", 64, 16, 0.59, 0.42),
        Case("fcmae", 96, 32, 0.6, 0.25),
        Case("fcmae_16", 96, 16, 0.6, 0.25),
        Case("depthwise_7", 64, 16, 0.75, 0.15),
        Case("depthwise_3", 64, 16, 0.75, 0.20),
        Case("conv_3", 64, 16, 0.75, 0.28),
        Case("block", 64, 16, 0.75, 0.25),
    )
}


class STUNet(nn.Module):
    """The encoder of STU-Net base: a residual block for each stage, the first without a stride."""

    def __init__(self, dims: Sequence[int] = (32, 64, 128, 256, 512, 512)) -> None:
        super().__init__()
        strides = (1, 2, 2, 2, 2, 1)
        self.stages = nn.ModuleList(map(ResidualBlock, (1, *dims[:-1]), dims, strides))

    def forward(self, x: Any) -> list[Any]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(dim, wider, 3, stride, 1), nn.InstanceNorm3d(wider, affine=True)
        self.conv2, self.norm2 = nn.Conv3d(wider, wider, 3, padding=1), nn.InstanceNorm3d(wider, affine=True)
        self.conv3, self.act = nn.Conv3d(dim, wider, 1, stride), nn.LeakyReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(y)) + self.conv3(x))


def residual_encoder() -> nn.Module:
    """Return the encoder of nnU-Net's plan ResEnc L."""
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    return ResidualEncoder(
        input_channels=1,
        n_stages=6,
        features_per_stage=[32, 64, 128, 256, 320, 320],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2, 2, 2],
        n_blocks_per_stage=[1, 3, 4, 6, 6, 6],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resenc": residual_encoder,
    "stunet": STUNet,
    "fcmae": functools.partial(create_fcmae, "atto", in_chans=1, ndim=3),
    "fcmae_16": functools.partial(create_fcmae, "atto", in_chans=1, ndim=3, stem=2),
    "depthwise_7": functools.partial(nn.Conv3d, 32, 32, 7, padding=3, groups=32),
    "depthwise_3": functools.partial(nn.Conv3d, 32, 32, 3, padding=1, groups=32),
    "conv_3": functools.partial(nn.Conv3d, 32, 32, 3, padding=1),
    "block": functools.partial(ConvNeXtV2Block, 32, ndim=3),
}


class Dense:
    """A network dense, with masked sites set to zero after every convolution and norm.

    Args:
        network: changed for good.
        mask: bool `(B, *grid)`, True = masked.
        side: pixels a side.
    """

    def __init__(self, network: nn.Module, mask: Tensor, side: int, dtype: torch.dtype) -> None:
        self.network, self.mask = network, mask
        self.visible: dict[int, Tensor] = {}
        while side >= mask.shape[-1]:
            visible = ~mask[:, None]
            for axis in range(2, 5):
                visible = visible.repeat_interleave(side // mask.shape[-1], axis)
            self.visible[side] = visible.to(dtype)
            side //= 2
        for module in network.modules():
            if isinstance(module, nn.Conv3d) and not isinstance(network, (FCMAE, ConvNeXtV2Block)):
                module.register_forward_hook(lambda module, args, out: self.masked(out))
            elif isinstance(module, _InstanceNorm):
                module.forward = functools.partial(self.instance_norm, module)

    def masked(self, x: Tensor) -> Tensor:
        """Return x times the mask; below the tile, where there is none, as it is."""
        return x * self.visible[x.shape[-1]] if x.shape[-1] in self.visible else x

    def instance_norm(self, module: Any, x: Tensor) -> Tensor:
        visible = self.visible.get(x.shape[-1], torch.ones_like(x[:, :1]))
        count, shape = visible.sum((2, 3, 4), keepdim=True), (1, -1, 1, 1, 1)
        centred = (x - x.sum((2, 3, 4), keepdim=True) / count) * visible
        scale = torch.rsqrt(centred.square().sum((2, 3, 4), keepdim=True) / count + module.eps)
        return centred * (scale * module.weight.view(shape)) + module.bias.view(shape) * visible

    def __call__(self, volumes: Tensor) -> Any:
        """Return the maps of the network, or the loss of FCMAE."""
        if isinstance(self.network, ConvNeXtV2Block):
            return masked_dense.masked_block(self.network, self.masked(volumes), self.visible[volumes.shape[-1]])
        if not isinstance(self.network, FCMAE):
            return self.network(self.masked(volumes))
        model = self.network
        encoded = masked_dense.forward_features(model.encoder, volumes, self.mask)[-1]
        x = torch.where(~self.mask[:, None], model.proj(encoded), model.mask_token)
        return model.reconstruction_loss(volumes, model.pred(model.decoder(x)), self.mask.flatten(1))


def values(x: SparseTensor | Tensor) -> Tensor:
    """Return the features of a SparseTensor; a dense map as it is."""
    return x.features if isinstance(x, SparseTensor) else x


class Workload:
    """A network and volumes of a case, and the same maps of them in several ways."""

    def __init__(self, case: Case, variants: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(case.threads)
        torch.compiler.reset()
        torch.manual_seed(0)
        self.case, self.variants = case, variants
        network = NETWORKS[case.name]().to(dtype).train()
        self.operator = isinstance(network, (nn.Conv3d, ConvNeXtV2Block))
        with torch.no_grad():  # nothing at 0 or 1, where a wrong factor would go unnoticed
            for name, parameter in network.named_parameters():
                if parameter.ndim == 1 or ".grn." in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        channels = 32 if self.operator else 1
        self.volumes = torch.randn(case.batch, channels, *(case.side,) * 3).to(dtype)
        generator = torch.Generator().manual_seed(0)
        self.mask = random_mask(case.batch, case.grid, case.ratio, generator=generator).view(-1, *case.grid)
        self.networks = {name: copy.deepcopy(network) for name in variants}
        self.calls = {name: self.call_of(name, copied, dtype) for name, copied in self.networks.items()}
        if self.operator:
            packed = self.packed()
            self.rows = packed.with_features(packed.features.detach().requires_grad_())
            self.volumes = self.rows.detach().dense().requires_grad_()
        last = self.volumes.detach().to(memory_format=torch.channels_last_3d)
        self.layouts = {True: self.volumes, False: last.requires_grad_(self.operator)}
        self.grads: dict[str, list[Tensor]] = {}

    def call_of(self, name: str, network: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Any]:
        if name == "sparse":
            return network
        if not name.endswith("contiguous"):
            network.to(memory_format=torch.channels_last_3d)
        call = Dense(network, self.mask, self.case.side, dtype)
        return torch.compile(call, dynamic=False) if name.startswith("compiled") else call

    def packed(self) -> SparseTensor:
        return SparseTensor.from_dense(self.volumes, self.mask, self.case.visible, below_tile="dense")

    def maps(self, name: str) -> list[Any]:
        """Return every map that the network answers, or the loss of FCMAE."""
        if name != "sparse":
            out = self.calls[name](self.layouts[name.endswith("contiguous")])
        elif isinstance(self.networks[name], FCMAE):
            out = self.networks[name](self.volumes, mask=self.mask, visible=self.case.visible)[0]
        else:
            out = self.calls[name](self.rows if self.operator else self.packed())
        return out if isinstance(out, list) else [out]

    def step(self, name: str) -> list[Any]:
        """Run forward and backward, to the gradients of all parameters, and return the maps."""
        maps = self.maps(name)
        if name not in self.grads:
            self.grads[name] = [self.grad(number, x) for number, x in enumerate(maps)]
        torch.autograd.backward([values(x) for x in maps], self.grads[name])
        return maps

    def grad(self, number: int, x: SparseTensor | Tensor) -> Tensor:
        """Return a random gradient of a map, the same at the visible sites of sparse and dense ones."""
        if not x.shape:
            return torch.ones_like(values(x))
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(number)).to(x.dtype)
        if isinstance(x, SparseTensor):
            return self.rows_of(grad)
        return grad.contiguous(memory_format=torch.channels_last_3d) if x.stride(1) == 1 else grad

    def rows_of(self, x: Any) -> Tensor:
        """Return the visible sites of a map as rows; what is dense below the tile, and a loss, as they are."""
        if isinstance(x, SparseTensor) or not x.shape or x.shape[-1] < self.mask.shape[-1]:
            return values(x)
        return SparseTensor.from_dense(x, self.mask, self.case.visible).features

    def drop_grads(self) -> None:
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)
        for leaf in (*self.layouts.values(), *([self.rows.features] if self.operator else [])):
            leaf.grad = None

    def outputs(self) -> dict[str, dict[str, Tensor]]:
        """Return the maps, in one vector of their visible sites, and the gradients of every variant."""
        found = {}
        for name, network in self.networks.items():
            output = torch.cat([self.rows_of(x).detach().flatten() for x in self.step(name)])
            found[name] = {"output": output, **measure.gradients(network)}
        self.drop_grads()
        return found

    def time(self, repeats: int, clock: str) -> dict[str, Any]:
        calls = {name: functools.partial(self.step, name) for name in self.variants}
        return measure.interleaved(calls, repeats, torch.device("cpu"), before=self.drop_grads, clock=clock)

    def saved_bytes(self) -> dict[str, int]:
        """Return what autograd keeps for backward, by variant."""
        inputs = [*self.layouts.values(), self.mask, *([self.rows.features] if self.operator else [])]
        inputs += [parameter for network in self.networks.values() for parameter in network.parameters()]

        def last_map(name: str) -> Tensor:
            return values(self.maps(name)[-1])

        return {name: measure.saved_bytes(functools.partial(last_map, name), inputs) for name in self.variants}


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return a case with its errors, times and memory.

    Raises:
        Mismatch: the variants differ; nothing was timed.
    """
    unfolds = case.name.startswith(("depthwise", "block")) or case.side > 96  # torch does, in float64
    small = replace(case, side=2 * case.patch) if unfolds else case
    found = Workload(small, ["sparse", "dense"], torch.float64).outputs()
    errors = measure.compare(f"sparse {case.key}", found["sparse"], found["dense"], DOUBLE_LIMIT, LEAST)
    say(f"  float64: output {errors['output']:.1e}, gradients {errors['gradient']:.1e} ({errors['parameter']})")
    workload = Workload(case, options.variants)
    say("  compiling what is new, comparing outputs")
    outputs = {name: found["output"] for name, found in workload.outputs().items()}
    expected = next(iter(outputs.values()))
    for name, output in outputs.items():
        difference = measure.relative_error(output, expected)
        if not difference <= FLOAT_LIMIT:
            raise measure.Mismatch(f"{name} of {case.key} differs from {options.variants[0]} by {difference:.1e}")
    say(f"  timing, {options.repeats} repeats")
    settings = {"visible": case.visible, "patches": math.prod(case.grid), "clock": options.clock}
    settings |= {"load": round(os.getloadavg()[0], 2), "errors": errors}
    times = workload.time(options.repeats, options.clock)
    saved = {"saved_bytes": workload.saved_bytes(), "geometry": geometry(workload.mask, options.repeats)}
    return {**asdict(case), **settings, "ms": times, **saved}


def geometry(mask: Tensor, repeats: int) -> dict[str, float]:
    """Return the milliseconds to list the visible tiles and their neighbours, and the bytes of these tables."""

    def build() -> TileSet:
        tiles = TileSet.from_mask(mask.flatten(1), tuple(mask.shape[1:]))
        tiles.neighbours((1, 1, 1))
        return tiles

    times = measure.interleaved({"geometry": build}, repeats, torch.device("cpu"))
    tiles = build()
    tables = (tiles.index, tiles.splits, *tiles.tables.values())
    return {"ms": times["geometry"]["median"], "bytes": sum(table.nbytes for table in tables)}


def print_tables(cases: Sequence[dict[str, Any]]) -> None:
    """Print a line for each variant of each case, relative to the best dense variant."""
    lines = []
    for case in cases:
        ms = {name: found["median"] for name, found in case["ms"].items()}
        best = min((ms[name] for name in DENSE if name in ms), default=None)
        least = min((case["saved_bytes"][name] for name in DENSE if name in ms), default=None)
        visible = case["visible"] / case["patches"]
        for name, value in ms.items():
            kept, sparse = case["saved_bytes"][name], name == "sparse"
            ratios = [value / best if best else "", case["goal"] if sparse else ""]
            memory = [kept / 2**20, kept / least if least else "", MEMORY_GOAL * visible if sparse else ""]
            lines.append([case["name"], name, value, *ratios, *memory])
        say(f"{case['name']}: geometry {case['geometry']['ms']:.2f} ms, {case['geometry']['bytes'] / 2**10:.0f} KiB")
    head = ("case", "variant", "ms", "of the best dense", "goal", "kept, MiB", "of the least", "goal")
    measure.print_table(head, lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--side", type=int, help="voxels a side of the volumes, in place of those of the cases")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: on a busy machine")
    parser.add_argument("--out", type=Path, help="results file (JSON); cases that it already holds are replaced")
    options = parser.parse_args(arguments)
    for name in options.cases:
        if options.side and options.side % CASES[name].patch:
            parser.error(f"--side is {options.side}: expected a multiple of the patches of {name}, {CASES[name].patch}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    setting = {"batch": options.batch, "threads": options.threads}
    cases = [replace(CASES[name], **setting, side=options.side or CASES[name].side) for name in options.cases]
    return measure.run_cases(cases, lambda case: measured(case, options), Results(options.out), print_tables)


if __name__ == "__main__":
    sys.exit(main())
