"""Normalise values by the numbers of ImageNet or of a data set, or each image by statistics of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecnx.train.data.source import Pixels
from sparsecnx.train.recipe import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Statistics are of the whole array up to this many values. Of a larger one they are of 16 parts, spread evenly over
# its first axis, that have as many: 128 MB in float32.
SAMPLED_VALUES = 2**25
PARTS = 16
PERCENTILES = (0.5, 99.5)
MEASURED = ("zscore", "percentiles")  # by these each entry has statistics, which refuse one without values


class UnsupportedValues(ValueError):
    """Values that cannot be normalised; the message says why."""


class Scale(NamedTuple):
    """How the values of a volume are normalised: `(x - shift) / scale`, clipped to 0 and 1 or not."""

    shift: Tensor
    scale: Tensor
    clip: bool


def normalize(images: Tensor, recipe: Recipe) -> Tensor:
    """Return images `(B, C, *size)` as float32, normalised by the numbers of ImageNet or of the data set.

    What is normalised one by one is so already, and is returned as it is.
    """
    if recipe.normalize == "imagenet":
        mean, std = _per_channel(IMAGENET_MEAN, images), _per_channel(IMAGENET_STD, images)
        return (images.float() / 255 - mean) / std
    if recipe.mean is None or recipe.std is None:
        return images
    low, high = recipe.value_range or (0.0, 1.0)
    return ((images.float() - low) / (high - low) - _per_channel(recipe.mean, images)) / _per_channel(
        recipe.std, images
    )


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(-1, *(1,) * (images.ndim - 2))


def values_in(images: Tensor) -> Tensor | None:
    """Return bool of the shape of images `(B, C, *size)`, False where a pixel has no value; None where all have one."""
    if not images.is_floating_point() or not (missing := images.isnan()).any():
        return None
    return ~missing


def as_floats(values: np.ndarray[Any, Any], *nodata: float | None) -> np.ndarray[Any, Any]:
    """Return a copy of the values of a file in float32, NaN where a value is one of `nodata`.

    Whole numbers are compared as they are. Floats are compared in float32, in which they are trained: in 64 bits a
    slope gives them digits that nobody types.
    """
    narrow = np.float16 if values.dtype == np.float16 else np.float32
    with np.errstate(over="ignore", under="ignore"):  # infinity is refused later, by name
        found = np.array(values, np.float32, order="C")
        for number in (one for one in nodata if one is not None):
            rounded = np.float64(number).astype(narrow)
            if values.dtype.kind == "f":
                in_range = np.isfinite(rounded) and (rounded != 0 or number == 0)
                marked = found == rounded if in_range else values == np.float64(number)
            elif values.dtype.kind in "iu" and float(number).is_integer():
                marked = values == int(number)
            else:
                marked = values.astype(np.float64) == number
            found[marked] = np.nan
    return found


def scale_of(pixels: Pixels, normalize: str) -> Scale | None:
    """Return how an image or a volume is normalised, see `Recipe.normalize`; None where the device does it.

    Raises:
        UnsupportedValues: a channel is constant or has no values, or values are not finite.
    """
    if normalize in ("imagenet", "dataset"):
        return None
    ones = (pixels.channels, *(1,) * len(pixels.size))
    if normalize == "none":
        return Scale(torch.zeros(ones), torch.ones(ones), False)
    values = sample_of(pixels).flatten(1).numpy()
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros((1, 1), bool)
    for channel in np.flatnonzero(missing.all(1)).tolist():
        raise UnsupportedValues(f"has no values in channel {channel}: it cannot be normalised; move it elsewhere")
    if missing.any():
        statistics: Any = (np.nanmin, np.nanmax, np.nanmean, np.nanstd, np.nanpercentile)
    else:
        statistics = (np.min, np.max, np.mean, np.std, np.percentile)
    least, most, mean, std, percentile = statistics
    if normalize == "zscore":
        low, high = mean(values, 1, dtype=np.float64), std(values, 1, dtype=np.float64)
    else:
        low, high = percentile(values, PERCENTILES, axis=1)
        high = high - low
    constant = least(values, 1) == most(values, 1)
    for channel in np.flatnonzero(constant | ~(high > 0)).tolist():
        where = f" in channel {channel}" if pixels.channels > 1 else ""
        if constant[channel]:
            value = least(values[channel])
            problem = f"is constant{where}, {value:g}: it cannot be normalised; move it elsewhere"
        else:
            problem = f"has equal percentiles {PERCENTILES}{where}, {low[channel]:g}; --normalize zscore takes it"
        raise UnsupportedValues(problem)
    shift, scale = (torch.from_numpy(part).float().view(ones) for part in (low, high))
    return Scale(shift, scale, normalize == "percentiles")


def sample_of(pixels: Pixels) -> Tensor:
    """Return all values, or those of parts of what is large, `(C, *)`; refuse some that `expect_numbers` refuses."""
    size = pixels.size
    thickness = max(SAMPLED_VALUES // (PARTS * pixels.channels * math.prod(size[1:])), 1)
    starts = [0]
    if thickness * PARTS >= size[0]:
        thickness = size[0]
    else:
        starts = [i * (size[0] - thickness) // (PARTS - 1) for i in range(PARTS)]
    corners = [(start, *(0,) * len(size[1:])) for start in starts]
    parts = [expect_numbers(pixels.read(corner, (thickness, *size[1:])), None, corner) for corner in corners]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def expect_numbers(values: Tensor, value_range: tuple[float, float] | None, start: Sequence[int]) -> Tensor:
    """Return the values of a box `(C, *size)` that begins at `start`.

    Raises:
        UnsupportedValues: one is infinite in float32, or outside the range. NaN is no value, and neither.
    """
    if value_range is None and not values.is_floating_point():
        return values
    low, high = extremes(values)
    if np.isinf([low, high]).any():
        wrong = values.isinf()
        channel, *place = wrong.nonzero()[0].tolist()
        voxel = tuple(first + i for first, i in zip(start, place, strict=True))
        what = f"holds {values[wrong][0].item()} in channel {channel} at {voxel}"
        raise UnsupportedValues(f"{what}: expected finite values, or NaN where there is none")
    if (problem := outside(low, high, value_range)) is not None:
        raise UnsupportedValues(problem)
    return values


def has_a_value(pixels: Pixels) -> bool:
    """Return whether an image or a volume is not NaN everywhere. It is read from the middle until a value is found."""
    length, *sides = pixels.size
    thickness = max(SAMPLED_VALUES // (pixels.channels * math.prod(sides)), 1)
    for start in sorted(range(0, length, thickness), key=lambda start: abs(2 * start + thickness - length)):
        part = pixels.read((start, *(0 for _ in sides)), (min(thickness, length - start), *sides))
        if not part.isnan().all():
            return True
    return False


def extremes(values: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the least and the largest value of each channel of `(C, *size)`, float64 `(C,)`; NaN where it has none."""
    axes = tuple(range(1, values.ndim))
    # fmin and fmax pass over NaN, in one pass each: 50 times as fast as an index of what is there.
    low, high = (least_or_most.reduce(values.numpy(), axes) for least_or_most in (np.fmin, np.fmax))
    return low.astype(np.float64), high.astype(np.float64)


def outside(
    low: np.ndarray[Any, Any], high: np.ndarray[Any, Any], value_range: tuple[float, float] | None
) -> str | None:
    """Return why channels with these extremes do not lie in a range, or None. A channel without values does."""
    if value_range is None or not ((low < value_range[0]) | (high > value_range[1])).any():
        return None
    least, most = value_range
    return f"holds values from {np.nanmin(low):g} to {np.nanmax(high):g}: expected {least:g} to {most:g}, --value-range"


def far_beyond(values: Tensor, seen: Sequence[tuple[float, float]]) -> str | None:
    """Return why values of a channel lie beyond its range in a sample by more than the width of that, or None.

    Args:
        values: `(C, *size)`, in the units of the files.
        seen: see `Source.seen`. A channel that is constant in the sample, or has no value there, takes all.
    """
    if not seen:
        return None
    (low, high), (least, most) = extremes(values), np.transpose(seen)
    width = most - least
    beyond = np.flatnonzero((width > 0) & ((low < least - width) | (high > most + width))).tolist()
    if not beyond:
        return None
    channel = beyond[0]
    where = f" in channel {channel}" if len(seen) > 1 else ""
    sample = f"the sample {least[channel]:g} to {most[channel]:g}"
    remedy = "other units, or a value for no data? --nodata, --value-range"
    return f"holds {low[channel]:g} to {high[channel]:g}{where}, {sample}: {remedy}"


def scaled(values: Tensor, scale: Scale | None) -> Tensor:
    """Return normalised values `(C, *size)` as float32; as they are where the device normalises them."""
    if scale is None:
        return values
    values = (values - scale.shift) / scale.scale
    return values.clamp(0, 1) if scale.clip else values
