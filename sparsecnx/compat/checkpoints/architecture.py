"""Which network a checkpoint is of, read from its names and shapes: any depths and widths."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecnx.models import FCMAE, SIZES, ConvNeXtV2, ConvNeXtV2Encoder
from sparsecnx.models.convnextv2 import STRIDE


class Unfit(Exception):
    """An entry, under our name, that is missing or of a shape that no network has.

    Attributes:
        name: of the entry.
        expected: what its shape should be, in words; None: the entry is missing.
    """

    def __init__(self, name: str, expected: str | None = None) -> None:
        super().__init__(name, expected)
        self.name = name
        self.expected = expected


class Decoder(NamedTuple):
    """The decoder of `FCMAE`: its arguments."""

    dim: int
    depth: int
    patch_size: int


@dataclass(frozen=True)
class Architecture:
    """A ConvNeXt V2, and what of it a checkpoint holds beside the encoder.

    Attributes:
        depths, dims: blocks and channels of the stages.
        in_chans: channels of the images.
        norm: whether the LayerNorm before the classifier is there.
        num_classes: outputs of the classifier, None without one.
        decoder: None without one.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    norm: bool
    num_classes: int | None
    decoder: Decoder | None

    @property
    def size(self) -> str | None:
        """Its name, such as `atto`; None for depths and widths of one's own."""
        config = (self.depths, self.dims)
        return next((name for name, size in SIZES.items() if (size.depths, size.dims) == config), None)

    def __str__(self) -> str:
        size = self.size or f"with depths {' '.join(map(str, self.depths))}, dims {' '.join(map(str, self.dims))}"
        parts = ["encoder"]
        parts += ["final norm"] * self.norm
        parts += [] if self.num_classes is None else [f"head of {self.num_classes} classes"]
        parts += ["decoder"] * (self.decoder is not None)
        return f"ConvNeXt V2 {size} ({', '.join(parts)})"

    def parameters(self) -> dict[str, Tensor]:
        """Every entry under our name, without values (on the device `meta`), in the order of the modules."""
        with torch.device("meta"):
            sizes: dict[str, Any] = {"depths": self.depths, "dims": self.dims, "in_chans": self.in_chans}
            entries = ConvNeXtV2(num_classes=self.num_classes or 1, **sizes).state_dict()
            if self.decoder is not None:
                dim, depth, patch_size = self.decoder
                entries |= FCMAE(ConvNeXtV2Encoder(**sizes), patch_size, depth, dim).state_dict()
        absent = ["encoder."]  # there without the prefix
        absent += [] if self.norm else ["norm."]
        absent += [] if self.num_classes is not None else ["head."]
        return {name: entry for name, entry in entries.items() if not name.startswith(tuple(absent))}


def infer(entries: Mapping[str, Tensor]) -> Architecture:
    """The network that entries under our names, whatever their layout, are of.

    Whether all of them are there and fit is the caller's to compare.

    Raises:
        Unfit: an entry that has to tell something is missing, or cannot be.
    """
    stages = range(max(_count(r"stages\.(\d+)\..*", entries), 1))
    depths = tuple(_count(rf"stages\.{i}\.(\d+)\..*", entries) for i in stages)
    dims = tuple(_width(rf"stages\.{i}\.\d+\.{PER_CHANNEL}", f"stages.{i}.0.norm.weight", entries) for i in stages)
    stem = _get("downsample_layers.0.0.weight", entries)
    if stem.ndim != 4:
        raise Unfit("downsample_layers.0.0.weight", f"({dims[0]}, channels of the images, 4, 4)")
    in_chans = stem.shape[1]

    norm, head, decoder = (any(name.startswith(part) for name in entries) for part in (NORM, HEAD, DECODER))
    return Architecture(
        depths,
        dims,
        in_chans,
        norm=norm or head,
        num_classes=_get("head.bias", entries).numel() if head else None,
        decoder=Decoder(
            dim=_width(rf"(mask_token|proj\.bias|decoder\.\d+\.{PER_CHANNEL})", "mask_token", entries),
            depth=_count(r"decoder\.(\d+)\..*", entries),
            patch_size=_patch_size(_get("pred.bias", entries).numel(), in_chans),
        )
        if decoder
        else None,
    )


NORM = ("norm.",)
HEAD = ("head.",)
DECODER = ("proj.", "mask_token", "decoder.", "pred.")
PER_CHANNEL = r"(dwconv\.bias|norm\.weight|norm\.bias|pwconv2\.bias)"  # of a block: one number per channel


def _get(name: str, entries: Mapping[str, Tensor]) -> Tensor:
    if name not in entries:
        raise Unfit(name)
    return entries[name]


def _width(pattern: str, example: str, entries: Mapping[str, Tensor]) -> int:
    """The size that most entries of a pattern have: one that is wrong shall be named, not all others."""
    sizes = [entry.numel() for name, entry in entries.items() if re.fullmatch(pattern, name)]
    return statistics.mode(sizes) if sizes else _get(example, entries).numel()


def _count(pattern: str, names: Iterable[str]) -> int:
    """How many different numbers the pattern's first group is."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _patch_size(outputs: int, in_chans: int) -> int:
    """Side of the patch whose pixels are the outputs of the decoder."""
    side = math.isqrt(outputs // max(in_chans, 1))
    if side == 0 or side % STRIDE or side**2 * in_chans != outputs:
        raise Unfit("pred.bias", f"(patch_size ** 2 * {in_chans},), patch_size a multiple of {STRIDE}")
    return side
