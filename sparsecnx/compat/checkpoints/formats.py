"""The names and layouts of each format.

A format is one list of entries: our name, its name, the layout. Both directions follow from that list. Our names are
those of `ConvNeXtV2` (encoder, `norm`, `head`) and of the decoder of `FCMAE`.

In names `{i}` is a stage, `{d}` a stage after the first (with a downsampling before it), `{j}` a block.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """The layout of an entry in a format.

    Attributes:
        theirs, ours: functions from our layout to that of the format and back; both return views.
        ndim: dimensions in the format; None if they are the same as ours.
    """

    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    ndim: int | None = None


def _square(kernel: Tensor) -> Tensor:
    """Reshape `(K, ...)` to `(kw, kh, ...)`."""
    side = math.isqrt(kernel.shape[0])
    return kernel.unflatten(0, (side, side))


SAME = Layout(lambda ours: ours, lambda theirs: theirs)
# MinkowskiEngine 0.5.4, checked by running it: in K the first spatial coordinate, y, varies fastest, so that
# weight[o, i, y, x] = kernel.view(kw, kh, C_in, C_out)[x, y, i, o].
KERNEL = Layout(  # ours (C_out, C_in, kh, kw), theirs (K, C_in, C_out)
    lambda weight: weight.permute(3, 2, 1, 0).flatten(0, 1),
    lambda kernel: _square(kernel).permute(3, 2, 1, 0),
    ndim=3,
)
DEPTHWISE_KERNEL = Layout(  # ours (C, 1, kh, kw), theirs (K, C)
    lambda weight: weight.squeeze(1).permute(2, 1, 0).flatten(0, 1),
    lambda kernel: _square(kernel).permute(2, 1, 0).unsqueeze(1),
    ndim=2,
)
BIAS_ROW = Layout(lambda bias: bias[None], lambda row: row.squeeze(0), ndim=2)  # ours (C,), theirs (1, C)
# ours (1, 1, 1, C), theirs (1, C) or (C,)
GRN_ROW = Layout(lambda grn: grn.flatten(0, 2), lambda row: row[None, None], ndim=2)
GRN_VECTOR = Layout(lambda grn: grn.flatten(), lambda vector: vector[None, None, None], ndim=1)
# ours (C_out, C_in), theirs (C_out, C_in, 1, 1)
POINTWISE = Layout(lambda linear: linear[..., None, None], lambda conv: conv.flatten(1), ndim=4)


class Entry(NamedTuple):
    """One parameter, or the same parameter in all stages and blocks."""

    ours: str
    theirs: str
    layout: Layout


def _layer(
    ours: str, theirs: str, weight: Layout = SAME, bias: Layout = SAME, names: tuple[str, str] = ("weight", "bias")
) -> tuple[Entry, Entry]:
    """Return the entries of a layer; `names` are those of its two parameters in the format."""
    our_names = ("gamma", "beta") if ours.endswith("grn") else ("weight", "bias")
    first, second = (f"{theirs}.{name}" for name in names)
    return Entry(f"{ours}.{our_names[0]}", first, weight), Entry(f"{ours}.{our_names[1]}", second, bias)


@dataclass(frozen=True)
class Format:
    """The names and layouts of one library.

    Attributes:
        name: the name for `convert` and `sparsecnx convert`.
        entries: all entries that the format has a place for.
        nested: True if its `.pt` files are `{"model": state_dict}` instead of the state dict itself.
    """

    name: str
    entries: tuple[Entry, ...]
    nested: bool = False

    def to_ours(self, name: str) -> tuple[str, Layout] | None:
        """Return our name of an entry and its layout, or None if the format does not have the name."""
        return next((found for e in self.entries if (found := _rename(name, e.theirs, e.ours, e.layout))), None)

    def to_theirs(self, name: str) -> tuple[str, Layout] | None:
        """Return the name in the format of our entry `name` and its layout, or None if there is no place for it."""
        return next((found for e in self.entries if (found := _rename(name, e.ours, e.theirs, e.layout))), None)

    def spelled(self, name: str) -> str | None:
        """Return a name as the format spells it, from one with `_` for some or all dots; None if it has none such.

        `features_only=True` of timm has `stages_0.blocks`, and copies of a network in buffers have no dots at all.
        """
        for entry in self.entries:
            if match := _compile(entry.theirs, "[._]").fullmatch(name):
                return entry.theirs.format(**match.groupdict())
        return None

    def prefix_of(self, name: str) -> str | None:
        """Return what stands before the name of an entry of the encoder, or None if `name` ends in no such name."""
        match = self._encoder.fullmatch(name)
        return match and match["prefix"]

    def has_part(self, name: str) -> bool:
        """Return whether a name begins with the first part of one of the format, such as `stages`."""
        return _first_part(name) in self._parts

    @functools.cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset(_first_part(entry.theirs) for entry in self.entries)

    @functools.cached_property
    def _encoder(self) -> re.Pattern[str]:
        encoder = [entry.theirs for entry in self.entries if entry.ours.startswith(("downsample_layers.", "stages."))]
        names = "|".join(re.sub(r"\?P<\w>", "?:", _compile(theirs, "[._]").pattern) for theirs in encoder)
        return re.compile(rf"(?P<prefix>(?:.*[._])?)(?:{names})", re.DOTALL)

    def place(self, name: str) -> tuple[str, Layout]:
        """Do as `to_theirs` for an entry that the format must have."""
        found = self.to_theirs(name)
        assert found is not None
        return found


def _rename(name: str, pattern: str, replacement: str, layout: Layout) -> tuple[str, Layout] | None:
    match = _compile(pattern).fullmatch(name)
    return match and (replacement.format(**match.groupdict()), layout)


@functools.cache
def _compile(pattern: str, dot: str = r"\.") -> re.Pattern[str]:
    """Return the regular expression of a pattern; `dot` is what stands for a dot in it."""
    numbers = {"i": "0|[1-9][0-9]*", "d": "[1-9][0-9]*", "j": "0|[1-9][0-9]*"}
    escaped = re.escape(pattern).replace(r"\.", dot)
    return re.compile(re.sub(r"\\{(\w)\\}", lambda hole: f"(?P<{hole[1]}>{numbers[hole[1]]})", escaped))


def _first_part(name: str) -> str:
    """Return the first part of a name, before a dot, or before `_` and a number."""
    return re.split(r"\.|_(?=\d)", name, maxsplit=1)[0]


def _published(layers: Sequence[str], prefix: str = "", grn: Layout = SAME) -> tuple[Entry, ...]:
    """Return the entries of layers whose names differ from ours by a prefix only."""
    entries: list[Entry] = []
    for name in layers:
        if name.endswith("grn"):
            entries += _layer(name, f"{prefix}{name}", grn, grn, ("gamma", "beta"))
        else:
            entries += _layer(name, f"{prefix}{name}")
    return tuple(entries)


def _block(name: str) -> list[str]:
    return [f"{name}.{layer}" for layer in ("dwconv", "norm", "pwconv1", "grn", "pwconv2")]


ENCODER = [
    *("downsample_layers.0.0", "downsample_layers.0.1", "downsample_layers.{d}.0", "downsample_layers.{d}.1"),
    *_block("stages.{i}.{j}"),
]
# The published decoder is dense, like ours.
DECODER = (Entry("mask_token", "mask_token", SAME), *_published(["proj", *_block("decoder.{j}"), "pred"]))

FCMAE = Format(
    "fcmae",
    (
        *_layer("downsample_layers.0.0", "encoder.downsample_layers.0.0"),
        *_layer("downsample_layers.0.1", "encoder.downsample_layers.0.1"),
        *_layer("downsample_layers.{d}.0", "encoder.downsample_layers.{d}.0.ln"),
        *_layer("downsample_layers.{d}.1", "encoder.downsample_layers.{d}.1", KERNEL, BIAS_ROW, ("kernel", "bias")),
        *_layer(
            "stages.{i}.{j}.dwconv", "encoder.stages.{i}.{j}.dwconv", DEPTHWISE_KERNEL, BIAS_ROW, ("kernel", "bias")
        ),
        *_layer("stages.{i}.{j}.norm", "encoder.stages.{i}.{j}.norm.ln"),
        *_layer("stages.{i}.{j}.pwconv1", "encoder.stages.{i}.{j}.pwconv1.linear"),
        *_layer("stages.{i}.{j}.grn", "encoder.stages.{i}.{j}.grn", GRN_ROW, GRN_ROW, ("gamma", "beta")),
        *_layer("stages.{i}.{j}.pwconv2", "encoder.stages.{i}.{j}.pwconv2.linear"),
        *DECODER,
    ),
    nested=True,
)

# The FCMAE weights for download: no decoder, dense names and kernels (ConvNeXt-V2 issues 47 and 65), and GRN parameters
# (1, C), to which the published fine-tuning adds two dimensions.
FCMAE_ENCODER = Format("fcmae-encoder", _published(ENCODER, grn=GRN_ROW), nested=True)

# The blocks of the first ConvNeXt have this in place of GRN.
LAYER_SCALE = "stages.{i}.{j}.gamma"

SPARSECNX = Format(
    "sparsecnx",
    (*_published(ENCODER, "encoder."), Entry(LAYER_SCALE, f"encoder.{LAYER_SCALE}", SAME), *DECODER),
)

CONVNEXTV2 = Format(
    "convnextv2", (*_published([*ENCODER, "norm", "head"]), Entry(LAYER_SCALE, LAYER_SCALE, SAME)), nested=True
)


def _timm(pointwise: Layout) -> Format:
    return Format(
        "timm",
        (
            *_layer("downsample_layers.0.0", "stem.0"),
            *_layer("downsample_layers.0.1", "stem.1"),
            *_layer("downsample_layers.{d}.0", "stages.{d}.downsample.0"),
            *_layer("downsample_layers.{d}.1", "stages.{d}.downsample.1"),
            *_layer("stages.{i}.{j}.dwconv", "stages.{i}.blocks.{j}.conv_dw"),
            *_layer("stages.{i}.{j}.norm", "stages.{i}.blocks.{j}.norm"),
            *_layer("stages.{i}.{j}.pwconv1", "stages.{i}.blocks.{j}.mlp.fc1", weight=pointwise),
            *_layer("stages.{i}.{j}.grn", "stages.{i}.blocks.{j}.mlp.grn", GRN_VECTOR, GRN_VECTOR),
            *_layer("stages.{i}.{j}.pwconv2", "stages.{i}.blocks.{j}.mlp.fc2", weight=pointwise),
            Entry(LAYER_SCALE, "stages.{i}.blocks.{j}.gamma", SAME),
            *_layer("norm", "head.norm"),
            *_layer("head", "head.fc"),
        ),
    )


# timm builds atto to nano with conv_mlp=True, and its larger sizes without.
TIMM_LINEAR = _timm(SAME)
TIMM_CONV = _timm(POINTWISE)
TIMM_CONV_SIZES = ("atto", "femto", "pico", "nano")


def _transformers(prefix: str) -> Format:
    stage = f"{prefix}encoder.stages"
    block = f"{stage}.{{i}}.layers.{{j}}"
    return Format(
        "transformers",
        (
            *_layer("downsample_layers.0.0", f"{prefix}embeddings.patch_embeddings"),
            *_layer("downsample_layers.0.1", f"{prefix}embeddings.layernorm"),
            *_layer("downsample_layers.{d}.0", f"{stage}.{{d}}.downsampling_layer.0"),
            *_layer("downsample_layers.{d}.1", f"{stage}.{{d}}.downsampling_layer.1"),
            *_layer("stages.{i}.{j}.dwconv", f"{block}.dwconv"),
            *_layer("stages.{i}.{j}.norm", f"{block}.layernorm"),
            *_layer("stages.{i}.{j}.pwconv1", f"{block}.pwconv1"),
            *_layer("stages.{i}.{j}.grn", f"{block}.grn"),
            *_layer("stages.{i}.{j}.pwconv2", f"{block}.pwconv2"),
            *_layer("norm", f"{prefix}layernorm"),
            *_layer("head", "classifier"),
        ),
    )


# ConvNextV2Model, and ConvNextV2ForImageClassification, which holds a ConvNextV2Model and a classifier.
TRANSFORMERS_MODEL = _transformers("")
TRANSFORMERS_CLASSIFIER = _transformers("convnextv2.")

# Those that hold kernels of any size and number of dimensions, and those that hold the blocks of the first ConvNeXt.
OF_ANY_KERNEL = (SPARSECNX, CONVNEXTV2)
OF_BLOCKS_V1 = (*OF_ANY_KERNEL, TIMM_LINEAR, TIMM_CONV)

# The first of two formats with the same names is taken, unless the dimensions fit the other better.
ALL = (
    *(FCMAE, SPARSECNX, CONVNEXTV2, FCMAE_ENCODER),
    *(TIMM_LINEAR, TIMM_CONV, TRANSFORMERS_MODEL, TRANSFORMERS_CLASSIFIER),
)
NAMES = tuple(dict.fromkeys(format.name for format in ALL))
