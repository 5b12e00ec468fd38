"""The values of several targets that belong to a crop of their image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsecnx.models import ImageTarget
from sparsecnx.models.targets import PixelTarget, Target
from sparsecnx.train.data.augment import resize
from sparsecnx.train.data.pictures import UPRIGHT, orientation, upright
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.targets import IMAGE, patch_of

# An image that is cut into fewer parts on an axis, by pixels of all its maps, has hardly any crops.
LEAST_STEPS = 4


class UnsupportedTarget(ValueError):
    """Say why a value of a target cannot be trained on."""


def as_array(value: Any) -> NDArray[Any]:
    """Return a value of an item as an array, an image of Pillow upright, with colours `(C, H, W)`."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    if not isinstance(value, Image.Image):
        return np.asarray(value)
    array = np.asarray(value)
    turned = upright(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), orientation(value))
    return turned[0] if array.ndim == 2 else turned


class TargetReader:
    """Read the targets of a recipe beside its images, and cut out those of a crop.

    Attributes:
        targets: by name, without the image itself.
        sides: of a crop of each map, by name.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.targets = {name: target for name, target in recipe.predicted.items() if name != IMAGE}
        self.resized, self.crop = recipe.crop_area is not None, recipe.size
        self.sides = {
            name: tuple(cells * patch for cells, patch in zip(recipe.grid, patch_of(target, recipe.patch), strict=True))
            for name, target in self.targets.items()
            if isinstance(target, PixelTarget)
        }

    def read(
        self, values: Mapping[str, Any], size: Sequence[int], turned: Mapping[str, int]
    ) -> dict[str, NDArray[Any] | None]:
        """Return the values of an image of sides `size`, whole and upright.

        Args:
            values: arrays or numbers, by the names of the targets; None where the image has no value.
            size: see above.
            turned: EXIF orientations, see `Source.turned`; others are upright.

        Raises:
            UnsupportedTarget: one is not there, or of another type or shape, or neither its pixels nor those of the
                image are a multiple of the others; or EXIF data turn a map and not the image, or the other way round.
        """
        for name in self.sides:
            if values.get(name) is not None and turned.get(name, UPRIGHT) != turned.get(IMAGE, UPRIGHT):
                problem = f"has {name} that EXIF data do not turn as they turn its image"
                raise UnsupportedTarget(f"{problem}: expected both upright, or both turned alike")
        return {name: _read(name, target, values, size) for name, target in self.targets.items()}

    def lattice(self, read: Mapping[str, NDArray[Any] | None], size: Sequence[int]) -> list[int]:
        """Return after how many pixels of an image, on each axis, pixels of it and of all targets begin together.

        Raises:
            UnsupportedTarget: no crop, or hardly any, consists of whole pixels of all of them.
        """
        maps = {name: value.shape[-len(size) :] for name in self.sides if (value := read[name]) is not None}
        steps = [
            math.lcm(*(max(pixels // sides[axis], 1) for sides in maps.values())) for axis, pixels in enumerate(size)
        ]
        held = ", ".join(f"{name} of {_typed(sides)} values" for name, sides in maps.items())
        problem = f"has {held} for {_typed(size)} pixels, whose pixels begin together every {_typed(steps)}"
        if self.resized and any(1 < step > pixels // LEAST_STEPS for pixels, step in zip(size, steps, strict=True)):
            expected = f"expected {LEAST_STEPS} such steps or more, to cut crops from, or --crop-area null"
            raise UnsupportedTarget(f"{problem}: {expected}")
        if not self.resized and any(side % step for side, step in zip(self.crop, steps, strict=True)):
            expected = f"expected crops, now of {_typed(self.crop)}, that are a multiple of them"
            raise UnsupportedTarget(f"{problem}: {expected}")
        return steps

    def cut(
        self, read: Mapping[str, NDArray[Any] | None], size: Sequence[int], start: Sequence[int], box: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the parts of all targets that belong to a box of their image; a label of the image is all of it.

        They are float32, or int64 of classes. Where there is no value, they are NaN or `ignore_index` all over.

        Args:
            read: as `read` returns it.
            size: sides of the image.
            start, box: where the box begins, and its sides, multiples of the `lattice`.

        Raises:
            UnsupportedTarget: one has classes that do not exist, or other sides than its patches, and crops are not
                resized.
        """
        found = {}
        for name, target in self.targets.items():
            value, wanted = read[name], self.sides.get(name, ())
            if value is None:
                found[name] = torch.full(target.shape(wanted), target.no_value)
                continue
            with _naming(name):
                if wanted:
                    value = value[_place(value.shape[-len(size) :], size, start, box)]
                tensor = _as_tensor(name, target, value)
                target.check(name, tensor[None], (1, *tensor.shape[tensor.ndim - len(wanted) :]))
                found[name] = self._fitted(name, target, tensor, wanted) if wanted else tensor
        return found

    def has_value(self, name: str, value: Tensor) -> bool:
        """Return whether there is a value in what `cut` returned for a target."""
        missing = self.targets[name].no_value
        return bool((~value.isnan() if math.isnan(missing) else value != missing).any())

    def _fitted(self, name: str, target: Target, value: Tensor, wanted: tuple[int, ...]) -> Tensor:
        """Return a crop of a map with the sides that its patches have, of classes the nearest ones."""
        sides = tuple(value.shape[-len(wanted) :])
        if sides != wanted and not self.resized:
            expected = f"its patch_size expects {_typed(wanted)}"
            raise UnsupportedTarget(f"has {name} of {_typed(sides)} values in a crop: {expected}")
        if isinstance(target, ImageTarget):
            return resize(value, wanted)
        for axis, (length, side) in enumerate(zip(sides, wanted, strict=True), -len(sides)):
            value = value.index_select(axis, ((torch.arange(side) + 0.5) * length / side).long())
        return value


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn every error into an UnsupportedTarget."""
    try:
        yield
    except UnsupportedTarget:
        raise
    except Exception as error:  # values of the user can be anything
        raise UnsupportedTarget(f"has {name} that does not fit ({error})") from error


def _read(name: str, target: Target, values: Mapping[str, Any], size: Sequence[int]) -> NDArray[Any] | None:
    if name not in values:
        raise UnsupportedTarget(f"has no {name}: expected a value, or None where there is none")
    if values[name] is None:
        return None
    with _naming(name):
        value = as_array(values[name])
        floats = isinstance(target.no_value, float)
        if value.dtype.kind not in ("iufb" if floats else "iub"):
            expected = "numbers" if floats or value.dtype.kind != "f" else "whole numbers, classes"
            raise UnsupportedTarget(f"has {name} of {value.dtype}: expected {expected}")
        if not isinstance(target, PixelTarget):  # one number, or an array of one
            value = value.reshape(target.shape(())) if value.size == math.prod(target.shape(())) else value
        sides = value.shape[-len(size) :] if isinstance(target, PixelTarget) else ()
        form = target.shape(tuple(sides))
        if value.shape != form or (isinstance(target, PixelTarget) and len(sides) != len(size)) or 0 in sides:
            axes = ("height", "width") if isinstance(target, PixelTarget) else ()
            expected = ", ".join([*map(str, form[: len(form) - len(sides)]), *axes])
            raise UnsupportedTarget(f"has {name} of the shape {value.shape}: expected ({expected})")
        if any(side % pixels and pixels % side for side, pixels in zip(sides, size, strict=False)):
            problem = f"has {name} of {_typed(sides)} values for {_typed(size)} pixels"
            raise UnsupportedTarget(f"{problem}: expected a multiple or an equal part of them")
    return value


def _place(sides: Sequence[int], size: Sequence[int], start: Sequence[int], box: Sequence[int]) -> Any:
    """Return the index of the part of a map of these sides that lies in a box of an image of sides `size`."""
    slices = [
        slice(first * side // pixels, first * side // pixels + length * side // pixels)
        for first, length, side, pixels in zip(start, box, sides, size, strict=True)
    ]
    return (..., *slices)


def _as_tensor(name: str, target: Target, value: NDArray[Any]) -> Tensor:
    """Return a value as float32, NaN where it is not finite; or as int64."""
    if not isinstance(target.no_value, float):
        return torch.from_numpy(value.astype(np.int64))
    with np.errstate(over="ignore"):
        numbers = value.astype(np.float32)
    missing = ~np.isfinite(numbers)
    if (missing & np.isfinite(value)).any():
        raise UnsupportedTarget(f"has {name} with values that float32 does not hold")
    numbers[missing] = np.nan
    return torch.from_numpy(numbers)


def _typed(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
