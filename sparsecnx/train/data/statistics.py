"""Range, mean and standard deviation of a data set, measured on a sample before a run begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.scale import extremes, outside, sample_of
from sparsecnx.train.data.source import Decoded, Source
from sparsecnx.train.recipe import Recipe

KNOWN_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
MOST_VALUES = 2**20  # of a channel of an image that are summed, evenly spread
SHOWN = 4  # channels
LOOKED_INTO = 4  # entries of the sample that are read to find missing values, where it was not measured
# These fields of a recipe say how an entry is read.
READING = ("ndim", "in_chans", "image_size", "patch_size", "mask_ratio", "crop_area", "max_pixels", "nodata", "pages")


class Moments(NamedTuple):
    """Number of values, mean and sum of squared deviations of every channel, float64 `(C,)`."""

    number: Tensor
    mean: Tensor
    squares: Tensor


def measure(source: Source, given: Mapping[str, Any], dtypes: Sequence[str]) -> dict[str, Any]:
    """Return `value_range`, `mean` and `std` of a recipe, as far as the user gave none.

    They are of up to 256 entries, spread evenly; `source.seen` gets the extremes of every channel. The range is known
    for 8 and 16 bits; of other types mean and standard deviation are in the units of the files.

    Args:
        source: what is measured.
        given: the fields that the user chose, and what is known of the others.
        dtypes: of the sample.

    Raises:
        InputError: the types differ and no range is given, values lie outside the given range, or a channel is constant
            or has no values.
    """
    if "value_range" in given:
        value_range = given["value_range"]
    else:
        if len(set(dtypes)) > 1:
            types, remedy = " and ".join(sorted(set(dtypes))), "expected one type, or --value-range for all"
            raise InputError("data", source.root, f"holds values of the types {types}; {remedy}")
        value_range = KNOWN_RANGES.get(next(iter(dtypes), ""))
    reading = {field: given[field] for field in READING if field in given}
    recipe = Recipe(**reading, normalize="dataset", value_range=value_range, mean=(0.0,), std=(1.0,))
    total: Moments | None = None
    for index, values in _values(source, recipe, source.sample()):
        least, most = extremes(values)
        if "value_range" in given and (problem := outside(least, most, value_range)) is not None:
            raise InputError("data", source.root, f"holds {source.name(index)}, which {problem}")
        total = _added(total, _moments(values))
        source.seen[:] = _widened(source.seen, least, most)
    found = {"value_range": value_range}
    if total is None:  # nothing can be read, which the first reading of the run names
        return found | {"mean": (0.0,), "std": (1.0,)}
    low, high = value_range or (0.0, 1.0)
    mean, std = (total.mean - low) / (high - low), (total.squares / total.number).sqrt() / (high - low)
    for channel, value in enumerate(std.tolist()):
        if not value > 0 and given.get("std") is None:
            constant = f"is constant in the sample, {total.mean[channel].item():g}"
            what = "has no values in the sample" if math.isnan(value) else constant
            raise InputError("data", source.root, f"channel {channel} {what}; expected others, or --std")
    return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())} | found


def _values(source: Source, recipe: Recipe, places: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers and values of entries that can be read; `source.gaps` gets whether some are missing."""
    for index in places:
        try:
            read = source.read(index, recipe)
            values = sample_of(Decoded(read) if isinstance(read, Tensor) else read)
        except InputError:  # the source cannot go on, as when a server is gone
            raise
        except Exception:  # decoders raise many kinds of errors; a run skips such files and names them
            continue
        source.gaps[source.name(index)] = values.is_floating_point() and bool(values.isnan().any())
        yield index, values


def _moments(values: Tensor) -> Moments:
    """Return the moments of an image `(C, *size)`, of values spread evenly where it has many."""
    flat = values.flatten(1)
    flat = flat[:, :: max(math.ceil(flat.shape[1] / MOST_VALUES), 1)].double()
    there = ~flat.isnan()
    count = there.sum(1).double()
    mean = flat.nan_to_num(0).sum(1) / count.clamp(min=1)
    return Moments(count, mean, torch.where(there, flat - mean[:, None], 0).square().sum(1))


def _added(one: Moments | None, other: Moments) -> Moments:
    """Return the moments of both (Chan, Golub and LeVeque 1979)."""
    if one is None:
        return other
    number = one.number + other.number
    share, delta = other.number / number.clamp(min=1), other.mean - one.mean
    squares = one.squares + other.squares + delta.square() * one.number * share
    return Moments(number, one.mean + delta * share, squares)


def looked_at(kinds: Counter[str], unreadable: Sequence[tuple[str, str]]) -> str:
    """Return how many files of a sample are of what kind, and how many cannot be read, in words."""
    told = [f"{count} {kind}" for kind, count in kinds.most_common()]
    if unreadable:
        name, reason = unreadable[0]
        told.append(f"{len(unreadable)} unreadable, such as {name} ({reason})")
    return f"files: {kinds.total() + len(unreadable)} looked at, {', '.join(told)}"


def _widened(
    seen: Sequence[tuple[float, float]], low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]
) -> list[tuple[float, float]]:
    """Return the ranges of channels, widened to these extremes; NaN is none."""
    least, most = np.transpose(seen) if seen else (low, high)
    return list(zip(np.fmin(least, low).tolist(), np.fmax(most, high).tolist(), strict=True))


def describe_gaps(source: Source, recipe: Recipe, dtypes: Iterable[str], numbers: Collection[float]) -> list[str]:
    """Return which values are missing in how many entries, for the first lines of a run; none if that cannot be.

    It counts the entries that were measured. Where there are none it reads a few.

    Args:
        source: what is described.
        recipe: that of the run.
        dtypes: of the sample. Values that are no floats are missing only if they are one of `numbers`.
        numbers: that stand for no value.
    """
    if not numbers and all(np.dtype(dtype).kind != "f" for dtype in dtypes):
        return []
    if not source.gaps:
        places = source.sample()
        some = sorted({i * len(places) // LOOKED_INTO for i in range(LOOKED_INTO)})
        for _ in _values(source, recipe, [places[i] for i in some]):
            pass
    missing = [name for name, some in source.gaps.items() if some]
    if not numbers and not missing:
        return []
    told = "no value: NaN" + (f" and {', '.join(f'{number:g}' for number in sorted(numbers))}" if numbers else "")
    if source.gaps:
        such = f", such as {missing[0]}" if missing else ""
        told += f", in {len(missing) or 'none'} of {len(source.gaps)} {source.noun}s looked into{such}"
    return [told]


def describe_scale(recipe: Recipe, given: Mapping[str, Any] | None, seen: Sequence[tuple[float, float]]) -> list[str]:
    """Return the numbers by which values are normalised, for the first lines of a run; none if they have their own.

    Args:
        recipe: that of the run.
        given: the fields that the user chose; None for a resumed run.
        seen: see `Source.seen`.
    """
    if recipe.normalize != "dataset":
        return []

    def origin(field: str, found: str) -> str:
        return "" if given is None else " (given)" if given.get(field) is not None else f" ({found})"

    there = [value for pair in seen for value in pair if not math.isnan(value)]
    sample = f"from {min(there):g} to {max(there):g} in the sample, " if there else ""
    scale = f"{sample}in the units of the files"
    if recipe.value_range is not None:
        low, high = recipe.value_range
        scale = f"from {low:g} to {high:g}{origin('value_range', 'known')}"
    mean, std = (f"{_few(getattr(recipe, field))}{origin(field, 'measured')}" for field in ("mean", "std"))
    return [f"values {scale}, mean {mean}, standard deviation {std}"]


def _few(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values[:SHOWN]) + " ..." * (len(values) > SHOWN)
