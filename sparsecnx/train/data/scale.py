"""How values are normalised: photographs by the numbers of ImageNet, others one by one by statistics of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecnx.train.data.source import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Statistics are of the whole array up to this many values. Of a larger one they are of 16 parts, spread evenly over
# its first axis, that have as many: 128 MB in float32.
SAMPLED_VALUES = 2**25
PARTS = 16
PERCENTILES = (0.5, 99.5)


class UnsupportedValues(ValueError):
    """Values that cannot be normalised; the message says why."""


class Scale(NamedTuple):
    """How the values of a volume are normalised: `(x - shift) / scale`, clipped to 0 and 1 or not."""

    shift: Tensor
    scale: Tensor
    clip: bool


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images `(B, 3, H, W)` as float32, normalised by ImageNet's mean and standard deviation.

    Volumes, which are floating, are normalised one by one when they are read, and are returned as they are.
    """
    if images.is_floating_point():
        return images
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def scale_of(pixels: Pixels, normalize: str) -> Scale | None:
    """Return how an image or a volume is normalised, see `Recipe.normalize`; None where the device does it.

    Raises:
        UnsupportedValues: values are not finite, or a channel is constant.
    """
    if normalize == "imagenet":
        return None
    ones = (pixels.channels, *(1,) * len(pixels.size))
    if normalize == "none":
        return Scale(torch.zeros(ones), torch.ones(ones), False)
    values = _sample(pixels).flatten(1).numpy()
    if normalize == "zscore":
        low, high = values.mean(1, dtype=np.float64), values.std(1, dtype=np.float64)
    else:
        low, high = np.percentile(values, PERCENTILES, axis=1)
        high = high - low
    constant = values.min(1) == values.max(1)
    for channel in np.flatnonzero(constant | ~(high > 0)).tolist():
        where = f" in channel {channel}" if pixels.channels > 1 else ""
        if constant[channel]:
            problem = f"is constant{where}, {values[channel, 0]:g}: it cannot be normalised; move it elsewhere"
        else:
            problem = f"has equal percentiles {PERCENTILES}{where}, {low[channel]:g}; --normalize zscore takes it"
        raise UnsupportedValues(problem)
    shift, scale = (torch.from_numpy(part).float().view(ones) for part in (low, high))
    return Scale(shift, scale, normalize == "percentiles")


def _sample(pixels: Pixels) -> Tensor:
    """Return all values, or those of parts of what is large, `(C, *)`; refuse some that are not finite."""
    size = pixels.size
    thickness = max(SAMPLED_VALUES // (PARTS * pixels.channels * math.prod(size[1:])), 1)
    starts = [0]
    if thickness * PARTS >= size[0]:
        thickness = size[0]
    else:
        starts = [i * (size[0] - thickness) // (PARTS - 1) for i in range(PARTS)]
    corners = [(start, *(0,) * len(size[1:])) for start in starts]
    parts = [finite(pixels.read(corner, (thickness, *size[1:])), corner) for corner in corners]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def finite(values: Tensor, start: Sequence[int]) -> Tensor:
    """Return the values of a box `(C, *size)` that begins at `start`.

    Raises:
        UnsupportedValues: one is not finite in float32.
    """
    found = values.isfinite()
    if not found.all():
        channel, *place = (~found).nonzero()[0].tolist()
        voxel = tuple(first + i for first, i in zip(start, place, strict=True))
        problem = f"holds {values[~found][0].item()} in channel {channel} at {voxel}"
        raise UnsupportedValues(f"{problem}: expected finite values; numpy.nan_to_num replaces them")
    return values


def scaled(values: Tensor, scale: Scale | None) -> Tensor:
    """Return normalised values `(C, *size)` as float32; as they are where the device normalises them."""
    if scale is None:
        return values
    values = (values - scale.shift) / scale.scale
    return values.clamp(0, 1) if scale.clip else values
