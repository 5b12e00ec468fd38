"""Networks of segmentation_models_pytorch, and for volumes of MONAI, on any network with feature maps.

Importing this registers our sizes with segmentation_models_pytorch:

    segmentation_models_pytorch.Unet("sparsecnx-atto", encoder_weights=None, classes=5)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.encoders import encoders
from segmentation_models_pytorch.encoders._base import EncoderMixin
from torch import Tensor, nn

from sparsecnx.common.errors import MissingExtra
from sparsecnx.models import SIZES, ConvNeXtV2Encoder
from sparsecnx.models.encoders import Stages, stages_of

ARCHITECTURES = ("upernet", "unet")
PREFIX = "sparsecnx-"
UPERNET_CHANNELS = 512  # of every map of the decoder, as published
UNET_CHANNELS = 256  # of the coarsest map of the decoder; each finer one has half of them
LEAST_CHANNELS = 16


class Encoder(nn.Module, EncoderMixin):
    """Any network with feature maps, as an encoder of segmentation_models_pytorch.

    It returns maps of the strides 1, 2, 4, ..., 2**depth. The images stand for a map of stride 1 that the network has
    not, and maps of 0 channels for others, as in encoders of that library.

    Attributes:
        network: the network.

    Args:
        network: of images, see `stages_of`. The stride of its maps are powers of 2, the same on both axes.
        depth: halvings; None for those of the network.
        output_stride: expected to be 32, which segmentation_models_pytorch gives.

    Raises:
        ValueError: the network is for other dimensions, has other strides, or has fewer halvings than `depth`.
    """

    def __init__(self, network: nn.Module, depth: int | None = None, output_stride: int = 32) -> None:
        nn.Module.__init__(self)
        EncoderMixin.__init__(self)
        self._stages = stages_of(network)
        if self._stages.ndim != 2:
            raise ValueError(f"network is of {self._stages.ndim} dimensions: expected one of images")
        if output_stride != 32:
            raise ValueError(f"output_stride is {output_stride}: expected 32, since the network is not dilated")
        halvings = halvings_of(self._stages)
        self._depth = halvings[-1] if depth is None else depth
        if self._depth > halvings[-1]:
            raise ValueError(f"encoder_depth is {depth}: expected at most {halvings[-1]}, the halvings of the network")
        self.network = network
        self._places = {number: place for place, number in enumerate(halvings) if number <= self._depth}
        channels = {0: self._stages.in_chans}
        channels |= {number: self._stages.channels[place] for number, place in self._places.items()}
        self._out_channels = [channels.get(number, 0) for number in range(self._depth + 1)]
        self._in_channels, self._output_stride = self._stages.in_chans, 2**self._depth

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of images `(B, C, H, W)`, the finest first."""
        maps: list[Tensor] = self._stages.maps(self.network, x)  # type: ignore[arg-type]
        found = []
        for number in range(self._depth + 1):
            if number in self._places:
                found.append(maps[self._places[number]])
            else:
                sides = [math.ceil(side / 2**number) for side in x.shape[2:]]
                found.append(x if number == 0 else maps[0].new_empty(len(x), 0, *sides))
        return found

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Raise ValueError unless the network takes so many channels."""
        if in_channels != self._in_channels:
            expected = f"expected {self._in_channels}, those of the network; `segmenter` takes one for others"
            raise ValueError(f"in_channels is {in_channels}: {expected}")


class VolumeEncoder(nn.Module):
    """Any network with feature maps of volumes, as an encoder of MONAI's FlexibleUNet."""

    def __init__(self, network: nn.Module, stages: Stages) -> None:
        super().__init__()
        self._stages, self.network = stages, network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of volumes `(B, C, D, H, W)`, the finest first."""
        return self._stages.maps(self.network, x)  # type: ignore[arg-type]


def segmenter(
    encoder: nn.Module | str | Path,
    classes: int,
    architecture: str = "upernet",
    decoder_channels: int | None = None,
) -> nn.Module:
    """Return a network that takes images `(B, C, *spatial)` and returns logits `(B, classes, *spatial)`.

    Sides are multiples of the stride of the encoder. Its decoder has new weights, from torch's global generator.

    Args:
        encoder: any network with feature maps, see `stages_of`; or a checkpoint of `sparsecnx pretrain`.
        classes: number of classes.
        architecture: `"upernet"` (arXiv 1807.10221) of images, whose strides begin at 4 or below and end at 8 or more;
            or `"unet"` (arXiv 1505.04597) of images, and of volumes through MONAI's FlexibleUNet.
        decoder_channels: of every map of UPerNet's decoder, by default 512 as published; of the coarsest of the
            U-Net's, by default 256.

    Raises:
        InputError: the checkpoint cannot be read.
        ValueError: the network or the architecture does not fit.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    if not isinstance(encoder, nn.Module):
        from sparsecnx.transfer.features import load_pretrained

        encoder = load_pretrained(encoder).encoder.train()
    stages = stages_of(encoder)
    depth = halvings_of(stages)[-1]
    first = decoder_channels or UNET_CHANNELS
    halving = tuple(max(first >> number, min(first, LEAST_CHANNELS)) for number in range(depth))
    if stages.ndim == 3 and architecture == "unet":
        return _of_volumes(encoder, stages, classes, halving)
    given: dict[str, Any] = {"encoder_depth": depth, "encoder_weights": None, "in_channels": stages.in_chans}
    with _named(encoders, {"encoder": lambda **options: Encoder(encoder, **options), "params": {}}) as name:
        if architecture == "unet":
            return smp.Unet(name, **given, classes=classes, decoder_channels=halving)
        return smp.UPerNet(name, **given, classes=classes, decoder_channels=decoder_channels or UPERNET_CHANNELS)


def halvings_of(stages: Stages) -> tuple[int, ...]:
    """Return how often the sides of each map were halved.

    Raises:
        ValueError: a stride is no power of 2, or differs between the axes.
    """
    for stride in stages.strides:
        if len(set(stride)) > 1 or stride[0].bit_count() != 1:
            sides = "x".join(map(str, stride))
            raise ValueError(f"encoder has a map of stride {sides}: expected powers of 2, the same on all axes")
    return tuple(stride[0].bit_length() - 1 for stride in stages.strides)


def _of_volumes(encoder: nn.Module, stages: Stages, classes: int, channels: tuple[int, ...]) -> nn.Module:
    try:
        from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE, FlexibleUNet
    except ImportError as error:
        raise MissingExtra("a U-Net of volumes needs MONAI, which is not installed: pip install monai") from error

    halvings = halvings_of(stages)
    if halvings != tuple(range(1, len(halvings) + 1)):
        strides = ", ".join(str(2**number) for number in halvings)
        raise ValueError(f"encoder has maps of the strides {strides}: expected 2, 4, 8, ... for a U-Net of volumes")
    entry = {
        "type": lambda **_: VolumeEncoder(encoder, stages),
        "feature_number": len(halvings),
        "feature_channel": stages.channels,
        "parameter": {"spatial_dims": 3, "in_channels": stages.in_chans, "pretrained": False},
    }
    with _named(FLEXUNET_BACKBONE.register_dict, entry) as name:
        made: nn.Module = FlexibleUNet(stages.in_chans, classes, name, decoder_channels=channels, spatial_dims=3)
    return made


@contextmanager
def _named(register: MutableMapping[str, Any], entry: dict[str, Any]) -> Iterator[str]:
    """Give a name under which a library finds an encoder, for as long as it builds a network."""
    name = f"{PREFIX}{id(entry)}"
    register[name] = entry
    try:
        yield name
    finally:
        del register[name]


def _register() -> None:
    """Register our sizes with segmentation_models_pytorch, for images in colour."""
    for size, shape in SIZES.items():

        def make(depths: tuple[int, ...] = shape.depths, dims: tuple[int, ...] = shape.dims, **options: Any) -> Encoder:
            return Encoder(ConvNeXtV2Encoder(depths, dims), **options)

        encoders[PREFIX + size] = {"encoder": make, "params": {}, "pretrained_settings": {}}


_register()
