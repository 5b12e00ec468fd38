"""The network that a checkpoint belongs to, of any depths and widths, read from names and shapes."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints.formats import Format
from sparsecnx.models import FCMAE, SIZES, ConvNeXtV2, ConvNeXtV2Encoder
from sparsecnx.models.convnextv2 import STRIDE


class Decoder(NamedTuple):
    """Arguments of the decoder of `FCMAE`."""

    dim: int
    depth: int
    patch_size: int


@dataclass(frozen=True)
class Architecture:
    """A ConvNeXt V2, and the parts of it that a checkpoint holds beside the encoder.

    Attributes:
        depths, dims: blocks and channels of the stages.
        in_chans: channels of the images.
        norm: True if the LayerNorm before the classifier is there.
        num_classes: outputs of the classifier; None if there is none.
        decoder: None if there is none.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    norm: bool
    num_classes: int | None
    decoder: Decoder | None

    @property
    def size(self) -> str | None:
        """Return the name of the size, such as `atto`; None for other depths and widths."""
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
        """Return every entry by our name, in the order of the modules, on the device `meta` (without values)."""
        with torch.device("meta"):
            sizes: dict[str, Any] = {"depths": self.depths, "dims": self.dims, "in_chans": self.in_chans}
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
    if stem.ndim != 4:
        name, shape = origin.place("downsample_layers.0.0.weight")[0], tuple(stem.shape)
        raise CheckpointError(f"{name} is {shape}: expected ({dims[0]}, channels of the images, 4, 4)")
    in_chans = stem.shape[1]

    norm, head, has_decoder = (any(name.startswith(part) for name in entries) for part in ("norm.", "head.", DECODER))
    decoder = None
    if has_decoder:
        bias = get("pred.bias")
        side = math.isqrt(bias.numel() // max(in_chans, 1))  # of the patch whose pixels the decoder predicts
        if side == 0 or side % STRIDE or side**2 * in_chans != bias.numel():
            expected = f"(patch_size ** 2 * {in_chans},), patch_size a multiple of {STRIDE}"
            raise CheckpointError(f"{origin.place('pred.bias')[0]} is {tuple(bias.shape)}: expected {expected}")
        dim = width(rf"(mask_token|proj\.bias|decoder\.\d+\.{PER_CHANNEL})", "mask_token")
        decoder = Decoder(dim, _count(r"decoder\.(\d+)\..*", entries), side)
    return Architecture(depths, dims, in_chans, norm or head, get("head.bias").numel() if head else None, decoder)


DECODER = ("proj.", "mask_token", "decoder.", "pred.")
PER_CHANNEL = r"(dwconv\.bias|norm\.weight|norm\.bias|pwconv2\.bias)"  # of a block: one number per channel


def _count(pattern: str, names: Iterable[str]) -> int:
    """Return how many different numbers the first group of the pattern takes."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})
