"""Feature maps of any convolutional network: their channels and strides, and how to get them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.tensor import SparseTensor

PROBE = 64  # pixels per side at least: a network of stride 32 leaves 2 of them
REMEDY = (
    "a network of timm has feature maps; of any other give a module that returns one or a list of them, such as "
    "torchvision.models.feature_extraction.create_feature_extractor makes"
)


@dataclass(frozen=True)
class Stages:
    """The feature maps of an encoder, one for each stride, the finest first.

    Attributes:
        in_chans: channels of the images.
        ndim: spatial dimensions.
        channels, strides: channels and pixels per site of each map.
        indices: their places among the maps that the encoder returns.
        intermediates: True if `forward_intermediates` returns them, as in timm's models.
    """

    in_chans: int
    ndim: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    indices: tuple[int, ...]
    intermediates: bool

    def maps(self, encoder: nn.Module, x: SparseTensor, last: int | None = None) -> list[Any]:
        """Return the maps of the visible pixels, the finest first; with `last` that many of the coarsest alone."""
        indices = self.indices if last is None else self.indices[-last:]
        if self.intermediates:
            return list(encoder.forward_intermediates(x, indices=list(indices), intermediates_only=True))  # type: ignore[operator]
        found = _listed(encoder(x))
        return [found[i] for i in indices]


def stages_of(encoder: nn.Module, tile: int | None = None, below_tile: str = "raise") -> Stages:
    """Return the feature maps of an encoder.

    Those of a model of timm or of ours are in its `feature_info`. Those of any other network are what it returns. In
    both cases a copy runs once, in evaluation, on an image of zeros, to learn now whether it runs on visible pixels.

    Args:
        encoder: a model of timm, also with `features_only=True`, or of ours, or any module that returns a feature map,
            or a list or dict of them, for a SparseTensor.
        tile: side of a patch of the image of zeros, pixels.
        below_tile: see `SparseTensor.from_dense`.

    Raises:
        TypeError: `encoder` is no module.
        ValueError: it has no convolution, does not run on visible pixels, or returns something else than feature maps.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder is a {type(encoder).__name__}: expected a module")
    first: Any = next((module for module in encoder.modules() if isinstance(module, _ConvNd)), None)
    if first is None:
        raise ValueError(f"encoder is a {type(encoder).__name__}: it has no convolution; expected a ConvNet")
    ndim, in_chans = first.weight.ndim - 2, getattr(encoder, "in_chans", first.in_channels)
    info: Any = getattr(encoder, "feature_info", None)
    intermediates = info is not None and hasattr(encoder, "forward_intermediates")
    if info is None:
        found = _probe(encoder, in_chans, ndim, tile or PROBE, below_tile)
    elif intermediates:
        found = [(info[i]["num_chs"], info[i]["reduction"]) for i in range(len(info))]
    else:
        found = list(zip(info.channels(), info.reduction(), strict=True))
    last = {stride: i for i, (_, stride) in enumerate(found)}  # the last map of each stride
    indices = tuple(sorted(last.values()))
    channels, strides = (tuple(found[i][part] for i in indices) for part in (0, 1))
    stages = Stages(in_chans, ndim, channels, strides, indices, intermediates)
    if info is not None and not first.weight.is_meta:
        stride = strides[-1]
        if not tile or tile < 1 or (tile % stride and (below_tile != "dense" or stride % tile)):
            tile = stride  # the caller says that `tile` does not fit
        _run(encoder, stages.maps, in_chans, ndim, tile, below_tile)
    return stages


@torch.no_grad()
def _run(
    encoder: nn.Module, maps: Callable[[nn.Module, SparseTensor], Any], in_chans: int, ndim: int, tile: int, below: str
) -> tuple[list[Any], tuple[int, ...]]:
    """Return the maps of a copy of an encoder for visible pixels of value 0, and the sides of that image.

    Raises:
        ValueError: it does not run on them.
    """
    config: Any = getattr(encoder, "pretrained_cfg", None) or {}
    side = config["input_size"][-1] if config.get("fixed_input_size") else PROBE
    grid = (math.ceil(side / tile),) * ndim
    parameter = next(encoder.parameters())
    images = parameter.new_zeros(1, in_chans, *(cells * tile for cells in grid))
    mask = torch.zeros(1, *grid, dtype=torch.bool, device=images.device)
    layout = Layout(TileSet.from_mask(mask, grid, below_tile=below), tile)
    x = SparseTensor(gather_rows(images, layout), layout)
    shared = {id(parameter): parameter for parameter in encoder.parameters()}  # all else is copied
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices):
            return maps(copy.deepcopy(encoder, shared).eval(), x), tuple(images.shape)
    except Exception as error:
        name = type(encoder).__name__
        raise ValueError(f"encoder is a {name}, which does not run on visible pixels: {error}") from error


def _probe(encoder: nn.Module, in_chans: int, ndim: int, tile: int, below_tile: str) -> list[tuple[int, int]]:
    """Return channels and stride of the maps that an encoder returns for visible pixels."""
    name = type(encoder).__name__
    maps, images = _run(encoder, lambda encoder, x: _listed(encoder(x)), in_chans, ndim, tile, below_tile)
    found = []
    for features in maps:
        shape = tuple(features.shape) if isinstance(features, (Tensor, SparseTensor)) else ()
        strides = {side // sites for side, sites in zip(images[2:], shape[2:], strict=False) if sites}
        whole = len(shape) == ndim + 2 and len(strides) == 1
        if not whole or any(side % sites for side, sites in zip(images[2:], shape[2:], strict=True)):
            given = shape or f"a {type(features).__name__}"
            raise ValueError(
                f"encoder is a {name}: it returned {given} for images {images}, expected a feature map; " + REMEDY
            )
        found.append((shape[1], strides.pop()))
    return found


def _listed(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, Sequence) else [output]
