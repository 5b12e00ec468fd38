"""The network that a checkpoint belongs to, of any depths and widths, read from names and shapes."""

from __future__ import annotations

import math
import operator
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints import formats
from sparsecnx.compat.checkpoints.formats import Format
from sparsecnx.geometry.masks import format_shape
from sparsecnx.models import FCMAE, SIZES, ConvNeXtV2, ConvNeXtV2Encoder
from sparsecnx.models.convnextv2 import one_if_equal


class Decoder(NamedTuple):
    """Arguments of the decoder of `FCMAE`."""

    dim: int
    depth: int
    patch_size: int | tuple[int, ...]


class Kernels(NamedTuple):
    """Sizes of the kernels of `ConvNeXtV2Encoder`, which are its dimensions and strides too."""

    kernel_size: tuple[int, ...]
    stem: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def stride(self) -> tuple[int, ...]:
        """Return the pixels per site after the last stage."""
        return tuple(math.prod(steps) for steps in zip(self.stem, *self.strides, strict=True))

    @property
    def published(self) -> bool:
        """Return whether these are the published ones, of images."""
        return self == published_kernels(1 + len(self.strides))

    def __str__(self) -> str:
        strides = " ".join(map(format_shape, self.strides))
        return f"kernel {format_shape(self.kernel_size)}, stem {format_shape(self.stem)}, strides {strides}"


def published_kernels(stages: int) -> Kernels:
    """Return the sizes of kernels of the published network, or of one that has another number of stages."""
    return Kernels((7, 7), (4, 4), ((2, 2),) * (stages - 1))


@dataclass(frozen=True)
class Architecture:
    """A ConvNeXt, and the parts of it that a checkpoint holds beside the encoder.

    Attributes:
        depths, dims: blocks and channels of the stages.
        in_chans: channels of the images.
        kernels: sizes of the kernels.
        norm: True if the LayerNorm before the classifier is there.
        num_classes: outputs of the classifier; None if there is none.
        decoder: None if there is none.
        block: `"v2"`, or `"v1"` for blocks of the first ConvNeXt.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    kernels: Kernels
    norm: bool
    num_classes: int | None
    decoder: Decoder | None
    block: str = "v2"

    @property
    def size(self) -> str | None:
        """Return the name of the size, such as `atto`; None for other depths and widths."""
        config = (self.depths, self.dims)
        return next((name for name, size in SIZES.items() if (size.depths, size.dims) == config), None)

    def __str__(self) -> str:
        size = self.size or f"with depths {' '.join(map(str, self.depths))}, dims {' '.join(map(str, self.dims))}"
        if not self.kernels.published:
            size = f"{size} with {self.kernels}"
        parts = ["encoder"]
        parts += ["final norm"] * self.norm
        parts += [] if self.num_classes is None else [f"head of {self.num_classes} classes"]
        parts += ["decoder"] * (self.decoder is not None)
        return f"ConvNeXt {self.block.upper()} {size} ({', '.join(parts)})"

    def parameters(self) -> dict[str, Tensor]:
        """Return every entry by our name, in the order of the modules, on the device `meta` (without values)."""
        with torch.device("meta"):
            sizes: dict[str, Any] = {"depths": self.depths, "dims": self.dims, "in_chans": self.in_chans}
            sizes |= {"ndim": len(self.kernels.stem), **self.kernels._asdict(), "block": self.block}
            entries = ConvNeXtV2(num_classes=self.num_classes or 1, **sizes).state_dict()
            if self.decoder is not None:
                dim, depth, patch_size = self.decoder
                entries |= FCMAE(ConvNeXtV2Encoder(**sizes), patch_size, depth, dim).state_dict()
        has = {"encoder.": False, "norm.": self.norm, "head.": self.num_classes is not None}
        absent = tuple(part for part, there in has.items() if not there)  # without "encoder." the names are ours
        return {name: entry for name, entry in entries.items() if not name.startswith(absent)}


def infer(entries: Mapping[str, Tensor], origin: Format) -> Architecture:
    """Infer the network from entries with our names, in any layout. The caller checks that they are complete and fit.

    Raises:
        CheckpointError: an entry that is needed for this is missing, or has an impossible shape; the message has its
            name in the format `origin`.
    """

    def get(name: str) -> Tensor:
        if name not in entries:
            raise CheckpointError(f"lacks {origin.place(name)[0]}")
        return entries[name]

    def width(pattern: str, example: str) -> int:
        """Return the size that most entries of a pattern have, so that a wrong one is reported and not all others."""
        sizes = [entry.numel() for name, entry in entries.items() if re.fullmatch(pattern, name)]
        return statistics.mode(sizes) if sizes else get(example).numel()

    stages = range(max(_count(r"stages\.(\d+)\..*", entries), 1))
    depths = tuple(_count(rf"stages\.{i}\.(\d+)\..*", entries) for i in stages)
    dims = tuple(width(rf"stages\.{i}\.\d+\.{PER_CHANNEL}", f"stages.{i}.0.norm.weight") for i in stages)
    stem = get("downsample_layers.0.0.weight")
    kernels = _kernels(entries, len(dims)) if origin in formats.OF_ANY_KERNEL else published_kernels(len(dims))
    if stem.ndim != 2 + len(kernels.stem):
        name, shape = origin.place("downsample_layers.0.0.weight")[0], tuple(stem.shape)
        raise CheckpointError(f"{name} is {shape}: expected ({dims[0]}, channels of the images, 4, 4)")
    in_chans = stem.shape[1]

    norm, head, has_decoder = (any(name.startswith(part) for name in entries) for part in ("norm.", "head.", DECODER))
    decoder = None
    if has_decoder:
        pred, stride = get("pred.weight"), kernels.stride
        if pred.ndim != 2 + len(stride):
            expected = f"(values of a patch, channels{', sites' * len(stride)})"
            raise CheckpointError(f"{origin.place('pred.weight')[0]} is {tuple(pred.shape)}: expected {expected}")
        patch = one_if_equal(tuple(map(operator.mul, pred.shape[2:], stride)))
        dim = width(rf"(mask_token|proj\.bias|decoder\.\d+\.{PER_CHANNEL})", "mask_token")
        decoder = Decoder(dim, _count(r"decoder\.(\d+)\..*", entries), patch)
    classes = get("head.bias").numel() if head else None
    encoder = [name for name in entries if name.startswith("stages.")]
    first = any(name.endswith(".gamma") for name in encoder) and not any(".grn." in name for name in encoder)
    return Architecture(depths, dims, in_chans, kernels, norm or head, classes, decoder, "v1" if first else "v2")


def _kernels(entries: Mapping[str, Tensor], stages: int) -> Kernels:
    """Return the sizes of kernels that entries with our names and layout have, those of images where they lack some."""
    stem = tuple(entries["downsample_layers.0.0.weight"].shape[2:])
    if not 1 <= len(stem) <= 3:
        return published_kernels(stages)
    depthwise = [tuple(entry.shape[2:]) for name, entry in entries.items() if re.fullmatch(DEPTHWISE, name)]
    fitting = [kernel for kernel in depthwise if len(kernel) == len(stem)] or [(7,) * len(stem)]
    strides = []
    for stage in range(1, stages):
        weight = entries.get(f"downsample_layers.{stage}.1.weight")
        known = weight is not None and weight.ndim == 2 + len(stem)
        strides.append(tuple(weight.shape[2:]) if weight is not None and known else (2,) * len(stem))
    return Kernels(statistics.mode(fitting), stem, tuple(strides))


DECODER = ("proj.", "mask_token", "decoder.", "pred.")
DEPTHWISE = r"stages\.\d+\.\d+\.dwconv\.weight"
PER_CHANNEL = r"(dwconv\.bias|norm\.weight|norm\.bias|pwconv2\.bias)"  # of a block: one number per channel


def _count(pattern: str, names: Iterable[str]) -> int:
    """Return how many different numbers the first group of the pattern takes."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})
