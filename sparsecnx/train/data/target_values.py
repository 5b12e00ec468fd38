"""The values of several targets that belong to a crop of their image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.models import ClassificationTarget, ClassMapTarget, ImageTarget, RegressionTarget
from sparsecnx.models.targets import PixelTarget, Target
from sparsecnx.train.data.augment import resize
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.targets import IMAGE, patch_of, read_targets


class UnsupportedTarget(ValueError):
    """A value of a target that cannot be trained on; the message says why."""


class TargetReader:
    """Read the targets of a recipe beside its images, and cut out those of a crop.

    Attributes:
        targets: by name, without the image itself.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.targets = {} if recipe.targets is None else read_targets(recipe.targets)
        self.targets.pop(IMAGE, None)
        self.resized = recipe.crop_area is not None
        self.sides = {
            name: tuple(cells * patch for cells, patch in zip(recipe.grid, patch_of(target, recipe.patch), strict=True))
            for name, target in self.targets.items()
            if isinstance(target, PixelTarget)
        }

    def whole(self, values: Mapping[str, Any], size: Sequence[int]) -> dict[str, Tensor | None]:
        """Return the values of an image of sides `size` as tensors, floats or int64, or None.

        Args:
            values: arrays or numbers, by the names of the targets; None where the image has no value.

        Raises:
            UnsupportedTarget: one is not there, or of another type or shape, has classes that do not exist, or so many
                pixels that neither they nor those of the image are a multiple of the others.
        """
        return {name: _whole(name, target, values, size) for name, target in self.targets.items()}

    def lattice(self, whole: Mapping[str, Tensor | None], size: Sequence[int]) -> list[int]:
        """Return after how many pixels of an image, on each axis, pixels of it and of all targets begin together."""
        maps = [value.shape[-len(size) :] for name in self.sides if (value := whole[name]) is not None]
        return [math.lcm(*(max(pixels // sides[axis], 1) for sides in maps)) for axis, pixels in enumerate(size)]

    def cut(
        self, whole: Mapping[str, Tensor | None], size: Sequence[int], start: Sequence[int], box: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the parts of all targets that belong to a box of their image; a label of the image is all of it.

        Where there is no value, it is NaN or `ignore_index` all over.

        Args:
            whole: as `whole` returns it.
            size: sides of the image.
            start, box: where the box begins, and its sides, multiples of the `lattice`.

        Raises:
            UnsupportedTarget: one has other sides than its patches, and crops are not resized.
        """
        found = {}
        for name, target in self.targets.items():
            value, wanted = whole[name], self.sides.get(name, ())
            if value is None:
                value = _no_value(target, wanted)
            elif wanted:
                sides = value.shape[-len(size) :]
                for axis, (first, length, side, pixels) in enumerate(zip(start, box, sides, size, strict=True)):
                    value = value.narrow(axis - len(size), first * side // pixels, length * side // pixels)
                cut = tuple(value.shape[-len(size) :])
                if cut != wanted and not self.resized:
                    problem = f"has {name} of {_typed(cut)} values in a crop: its patch_size expects {_typed(wanted)}"
                    raise UnsupportedTarget(problem)
                value = _resized(target, value, wanted)
            found[name] = value
        return found


def _whole(name: str, target: Target, values: Mapping[str, Any], size: Sequence[int]) -> Tensor | None:
    if name not in values:
        raise UnsupportedTarget(f"has no {name}: expected a value, or None where there is none")
    if values[name] is None:
        return None
    array = np.asarray(values[name])
    if array.dtype.kind not in "iuf":
        raise UnsupportedTarget(f"has {name} of {array.dtype}: expected numbers")
    floats = isinstance(target, (ImageTarget, RegressionTarget))
    if not floats and array.dtype.kind == "f":
        raise UnsupportedTarget(f"has {name} of {array.dtype}: expected whole numbers, classes")
    found = torch.from_numpy(array.astype(np.float32 if floats else np.int64))
    if isinstance(target, RegressionTarget):
        found = found.reshape(-1)  # one number is one value
    sides = tuple(found.shape[-len(size) :]) if isinstance(target, PixelTarget) else ()
    try:
        target.check(name, found[None], (1, *sides))
    except (TypeError, ValueError) as error:
        raise UnsupportedTarget(f"has a target that does not fit: {error}") from error
    if any(side % pixels and pixels % side for side, pixels in zip(sides, size, strict=False)):
        problem = f"has {name} of {_typed(sides)} values for {_typed(size)} pixels"
        raise UnsupportedTarget(f"{problem}: expected a multiple or an equal part of them")
    return found


def _no_value(target: Target, sides: tuple[int, ...]) -> Tensor:
    """Return the value of a target that an image does not have, of the sides of a crop; a label has none."""
    if isinstance(target, ImageTarget):
        return torch.full((target.channels, *sides), torch.nan)
    if isinstance(target, RegressionTarget):
        return torch.full((target.values,), torch.nan)
    assert isinstance(target, (ClassMapTarget, ClassificationTarget))
    return torch.full(sides, target.ignore_index)


def _resized(target: Target, value: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return a crop with these sides, of classes the nearest ones."""
    if isinstance(target, ImageTarget):
        return resize(value, sides)
    for axis, side in enumerate(sides, -len(sides)):
        length = value.shape[axis]
        value = value.index_select(axis, ((torch.arange(side) + 0.5) * length / side).long())
    return value


def _typed(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
