"""Feature maps of any convolutional network: their channels and strides, and how to get them."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsecnx.geometry.layout import Layout, per_axis
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.tensor import SparseTensor

PROBE = 64  # pixels per side at least
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
        channels: channels of each map.
        strides: pixels per site of each map, along each axis.
        indices: their places among the maps that the encoder returns.
        intermediates: True if `forward_intermediates` returns them, as in timm's models.
    """

    in_chans: int
    ndim: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]
    intermediates: bool

    def maps(self, encoder: nn.Module, x: SparseTensor, last: int | None = None) -> list[Any]:
        """Return the maps of the visible pixels, the finest first; with `last` that many of the coarsest alone."""
        indices = self.indices if last is None else self.indices[-last:]
        if self.intermediates:
            return list(encoder.forward_intermediates(x, indices=list(indices), intermediates_only=True))  # type: ignore[operator]
        found = _listed(encoder(x))
        return [found[i] for i in indices]


def stages_of(encoder: nn.Module, patch: int | Sequence[int] | None = None, below_tile: str = "raise") -> Stages:
    """Return the feature maps of an encoder.

    Those of a model of timm or of ours are in its `feature_info`. Those of any other network are what it returns. In
    both cases a copy runs once, in evaluation, on an image of zeros, to learn now whether it runs on visible pixels.

    Args:
        encoder: a model of timm, also with `features_only=True`, or of ours, or any module that returns a feature map,
            or a list or dict of them, for a SparseTensor.
        patch: sides of the patches of the image of zeros, pixels, one number or one for each axis.
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
    sides = () if patch is None else per_axis(patch if isinstance(patch, int) else tuple(patch), ndim)
    fitting = len(sides) == ndim and min(sides) > 0  # Otherwise the caller says that they do not fit.
    if info is None:
        found = _probe(encoder, in_chans, ndim, sides if fitting else _probed(ndim), below_tile)
    else:
        given = [info[i] for i in range(len(info))] if intermediates else info.get_dicts()
        found = [(one["num_chs"], per_axis(one.get("strides", one["reduction"]), ndim)) for one in given]
    last = {stride: i for i, (_, stride) in enumerate(found)}  # the last map of each stride
    indices = tuple(sorted(last.values()))
    channels, strides = tuple(found[i][0] for i in indices), tuple(found[i][1] for i in indices)
    stages = Stages(in_chans, ndim, channels, strides, indices, intermediates)
    if info is not None and not first.weight.is_meta:
        fitting = fitting and fits(sides, strides[-1], below_tile)
        _run(encoder, stages.maps, in_chans, ndim, sides if fitting else strides[-1], below_tile)
    return stages


def fits(patch: tuple[int, ...], stride: tuple[int, ...], below_tile: str) -> bool:
    """Return whether each side of a patch is a multiple of the stride of a network, or below it where that may be."""
    dense = below_tile == "dense"
    return all(p > 0 and (p % s == 0 or (dense and s % p == 0)) for p, s in zip(patch, stride, strict=True))


def _probed(ndim: int) -> tuple[int, ...]:
    """Return the sides of the image of zeros: a network of stride 32 leaves two sites, a volume is no larger."""
    return (PROBE,) * ndim if ndim < 3 else (PROBE, PROBE // 2, PROBE // 2)


@torch.no_grad()
def _run(
    encoder: nn.Module,
    maps: Callable[[nn.Module, SparseTensor], Any],
    in_chans: int,
    ndim: int,
    tile: tuple[int, ...],
    below: str,
) -> tuple[list[Any], tuple[int, ...]]:
    """Return the maps of a copy of an encoder for visible pixels of value 0, and the sides of that image.

    Raises:
        ValueError: it does not run on them.
    """
    config: Any = getattr(encoder, "pretrained_cfg", None) or {}
    sides = (config["input_size"][-1],) * ndim if config.get("fixed_input_size") else _probed(ndim)
    grid = tuple(math.ceil(side / p) for side, p in zip(sides, tile, strict=True))
    parameter = next(encoder.parameters())
    images = parameter.new_zeros(1, in_chans, *map(operator.mul, grid, tile))
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


def _probe(
    encoder: nn.Module, in_chans: int, ndim: int, tile: tuple[int, ...], below_tile: str
) -> list[tuple[int, tuple[int, ...]]]:
    """Return channels and strides of the maps that an encoder returns for visible pixels."""
    name = type(encoder).__name__
    maps, images = _run(encoder, lambda encoder, x: _listed(encoder(x)), in_chans, ndim, tile, below_tile)
    found = []
    for features in maps:
        shape = tuple(features.shape) if isinstance(features, (Tensor, SparseTensor)) else ()
        extents = list(zip(images[2:], shape[2:], strict=False))
        if len(shape) != ndim + 2 or any(sites == 0 or side % sites for side, sites in extents):
            given = shape or f"a {type(features).__name__}"
            raise ValueError(
                f"encoder is a {name}: it returned {given} for images {images}, expected a feature map; " + REMEDY
            )
        found.append((shape[1], tuple(side // sites for side, sites in extents)))
    return found


def _listed(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, Sequence) else [output]
