"""The crops that a run trains on.

Every random choice is a function of the seed and of its place in the run. A run that was stopped therefore goes on
exactly as it would have, with any number of workers:

    order of an epoch    (seed, epoch)
    crop and flip        (seed, epoch, position in the epoch)
    mask                 (seed, forward pass), drawn in masks.py
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.augment import central_crop, mirrored_axes, random_box, resize
from sparsecnx.train.data.order import mix
from sparsecnx.train.data.pictures import UnsupportedImage
from sparsecnx.train.data.scale import (
    MEASURED,
    Scale,
    UnsupportedValues,
    expect_numbers,
    far_beyond,
    has_a_value,
    scale_of,
    scaled,
    values_in,
)
from sparsecnx.train.data.source import Decoded, Pixels, Source, too_small
from sparsecnx.train.data.target_values import TargetReader, UnsupportedTarget
from sparsecnx.train.data.transform import load_transform, transformed
from sparsecnx.train.recipe import Recipe

T = TypeVar("T")

# Decoded entries that a reading process keeps take this much memory at most, but for the one in use.
HELD_BYTES = 2**30
HELD_SCALES = 10_000  # entries of which a reading process keeps the statistics, and whether they have a value


class Draw(NamedTuple):
    """One sample to make: the number of the image, and the seed of its crop and flip."""

    image: int
    seed: int


class Sample(NamedTuple):
    """Hold one crop, what else is predicted from it, see `Recipe.targets`, and the files that a `Batch` names."""

    image: Tensor
    targets: dict[str, Tensor]
    unreadable: dict[str, str]
    unusual: dict[str, str]


class Batch(NamedTuple):
    """One batch of crops.

    Attributes:
        images: uint8 or float32 `(B, C, *size)`, see `normalize`, NaN where there is no value; empty if `problem` is
            set.
        valid: where they have values, see `values_in`.
        targets: what else is predicted from them, by name.
        unreadable: the files that were skipped, and why.
        unusual: the files of which a crop holds values far beyond those of the sample, and which.
        problem: the reason why there is no batch. A worker that raised it would send a traceback in words instead.
    """

    images: Tensor
    valid: Tensor | None
    targets: dict[str, Tensor]
    unreadable: dict[str, str]
    unusual: dict[str, str]
    problem: InputError | None = None


class Entry(NamedTuple):
    """An entry of a source, and how its values are normalised; None leaves that to the device, see `normalize`."""

    pixels: Pixels
    scale: Scale | None
    place: int


class Crops(Dataset[Any]):
    """Augmented crops of a source, indexed by `Draw`; equal draws give equal crops.

    Another entry takes the place of an unreadable one, see `Source.instead`, so that batches stay full.

    Attributes:
        targets: reads what else is predicted.
        absent: names of the targets that no crop of `try_out` had a value of.

    Raises:
        InputError: the transform of the recipe cannot be used.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.source, self.recipe = source, recipe
        self.transform = None if recipe.transform is None else load_transform(recipe.transform)
        self.targets = TargetReader(recipe)
        self.absent = set(self.targets.targets)
        self.scales: OrderedDict[int, Scale] = OrderedDict()
        self.held: OrderedDict[int, Pixels] = OrderedDict()
        self.with_value: OrderedDict[int, bool] = OrderedDict()  # whether an entry has one anywhere

    def __getitem__(self, draw: Draw) -> Sample | InputError:
        try:
            (place, crop, targets), unreadable = self._readable(
                draw.image, lambda place: (place, *self.crop(place, draw.seed))
            )
            problem = None if self.recipe.value_range else far_beyond(crop, self.source.seen)
            unusual = {} if problem is None else {self.source.name(place): problem}
            return Sample(self._transformed(crop, draw.seed), targets, unreadable, unusual)
        except InputError as error:
            return error

    def crop(self, place: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a crop of entry `place`, drawn from a seed, a box, resized or not, and mirrored; and its targets."""
        entry, size, area = self.whole(place), self.recipe.size, self.recipe.crop_area
        sides = entry.pixels.size
        read = {}
        if self.targets.targets:
            read = self.targets.read(self.source.values(place), sides, self.source.turned(place))
        steps = self.targets.lattice(read, sides)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            start, box = random_box(sides, size, area, steps)
            crop, axes = self._cut(entry, start, box), mirrored_axes(len(size))
        if crop.is_floating_point() and crop.isnan().all():
            read = dict.fromkeys(read)  # nothing is predicted from nothing
        targets = self.targets.cut(read, sides, start, box)
        maps = {name: value.flip(axes) for name, value in targets.items() if name in self.targets.sides}
        return crop.flip(axes), targets | maps

    def _transformed(self, crop: Tensor, seed: int) -> Tensor:
        """Return a crop as the transform returns it. Raise InputError if that fails, which is no fault of the image."""
        if self.transform is None:
            return crop
        try:
            return transformed(self.transform, crop, seed)
        except Exception as error:  # code of the user can raise anything
            problem = f"{type(error).__name__}: {error}; expected a function that takes and returns a tensor (C, *size)"
            raise InputError("transform", self.recipe.transform, problem) from error

    def _cut(self, entry: Entry, start: Sequence[int], sides: Sequence[int]) -> Tensor:
        """Return a box of an entry, normalised, and resized to the crop where crops are resized."""
        values = self._values(entry, start, sides)
        return scaled(values if self.recipe.crop_area is None else resize(values, self.recipe.size), entry.scale)

    def _values(self, entry: Entry, start: Sequence[int], sides: Sequence[int]) -> Tensor:
        """Return a box of an entry, which may have no value, where the entry has one elsewhere."""
        values = expect_numbers(entry.pixels.read(start, sides), self.recipe.value_range, start)
        if self.recipe.normalize in MEASURED or not values.is_floating_point():
            return values
        if entry.place not in self.with_value:
            self.with_value[entry.place] = not values.isnan().all() or has_a_value(entry.pixels)
            if len(self.with_value) > HELD_SCALES:
                self.with_value.popitem(last=False)
        if not self.with_value[entry.place]:
            raise UnsupportedValues("has no value anywhere; move it elsewhere")
        return values

    def try_out(self) -> None:
        """Read an entry and make a crop of it; and of each entry of a sample, where there are targets.

        Raises:
            InputError: no entry can be read, the transform does not take its crop, or a target does not fit.
        """
        for place in self.source.sample() if self.targets.targets else ():
            try:
                _, targets = self.crop(place, self.recipe.seed)
                self.absent -= {name for name, value in targets.items() if self.targets.has_value(name, value)}
            except UnsupportedTarget as error:
                raise InputError("targets", self.source.name(place), str(error)) from error
            except InputError:
                raise
            except Exception:  # it is skipped and named when it is read
                continue
        (crop, _), _ = self._readable(0, lambda place: self.crop(place, self.recipe.seed))
        self._transformed(crop, self.recipe.seed)

    def central(self, place: int, share: float = 1.0) -> Tensor:
        """Return the centre of entry `place`, resized until a share of it just covers the crop where crops are resized.

        Args:
            place: number of the entry.
            share: of the sides that the crop shows then, such as the 224 of 256 pixels that ImageNet is tested with.
        """
        entry, size = self.whole(place), self.recipe.size
        if self.recipe.crop_area is not None:
            values = self._values(entry, [0] * len(size), entry.pixels.size)
            return scaled(central_crop(values, size, share), entry.scale)
        start = [(side - part) // 2 for side, part in zip(entry.pixels.size, size, strict=True)]
        return self._cut(entry, start, size)

    def whole(self, place: int) -> Entry:
        """Return entry `place`. Its statistics are kept while there is room.

        Raises:
            UnsupportedImage: it has no crop.
            Exception: as the source and `scale_of` do.
        """
        pixels = self._pixels(place)
        if (problem := too_small(pixels.size, self.recipe)) is not None:
            raise UnsupportedImage(problem)
        scale = self.scales.get(place) or scale_of(pixels, self.recipe.normalize)
        if scale is not None:
            self.scales[place] = scale
            if len(self.scales) > HELD_SCALES:
                self.scales.popitem(last=False)
        return Entry(pixels, scale, place)

    def _pixels(self, place: int) -> Pixels:
        """Return entry `place`, which is kept where the source is small, or where no part of it can be read alone."""
        if place in self.held:
            self.held.move_to_end(place)
            return self.held[place]
        read = self.source.read(place, self.recipe)
        pixels: Pixels = read if not isinstance(read, Tensor) else self._decoded(read)
        if self.source.small or pixels.bytes_held:
            self.held[place] = pixels
            while len(self.held) > 1 and sum(held.bytes_held for held in self.held.values()) > HELD_BYTES:
                self.held.popitem(last=False)
        return pixels

    def _decoded(self, values: Tensor) -> Decoded:
        return Decoded(expect_numbers(values, self.recipe.value_range, (0,) * (values.ndim - 1)))

    def _readable(self, index: int, make: Callable[[int], T]) -> tuple[T, dict[str, str]]:
        """Return what `make` returns for entry `index`, or for the first one instead of it that can be read."""
        unreadable: dict[str, str] = {}
        for place in self.source.instead(index, self.recipe.seed):
            try:
                return make(place), unreadable
            except InputError:
                raise
            except Exception as error:  # decoders raise many kinds of errors, and none may end a long run
                unreadable[self.source.name(place)] = f"{type(error).__name__}: {error}"
        name, reason = next(iter(unreadable.items()))
        noun = self.source.noun
        problem = f"none of its {len(unreadable)} {noun} files can be read, first {name} ({reason})"
        raise InputError("data", self.source.root, problem)


def draws(
    recipe: Recipe,
    source: Source,
    part: Callable[[Sequence[int]], Sequence[int]] = lambda batch: batch,
    *,
    ranks: int = 1,
    start: int = 0,
) -> Iterator[list[Draw]]:
    """Yield the draws of every batch of a run, from batch `start` to the end of the last epoch.

    An epoch shows each entry `epoch_repeats` times, in the order of the source.

    Args:
        recipe: its seed, epochs and sizes count.
        source: it gives the order, and is told what comes.
        part: returns of the positions of a batch in its epoch those that are wanted, such as those of one process.
        ranks: processes of the run.
        start: number of the first batch.
    """
    batches_per_epoch, size = recipe.steps_per_epoch(len(source)) * recipe.grad_accum_steps, recipe.batch_size
    ahead = math.ceil(source.ahead * ranks / size)  # batches
    for number in range(start, recipe.epochs * batches_per_epoch):
        epoch, batch = divmod(number, batches_per_epoch)
        if batch == 0 or number == start:
            order = source.order(recipe.seed, epoch, recipe.epoch_repeats, size, ranks).tolist()
        positions = part(range(batch * size, (batch + 1) * size))
        if ahead:
            later = part(range((batch + ahead) * size, (batch + ahead + 1) * size))
            source.expect([order[position] for position in later if position < len(order)])
        yield [Draw(order[position], mix(recipe.seed, "crop", epoch, position)) for position in positions]


def collate(samples: list[Sample | InputError]) -> Batch:
    """Stack the crops and the targets of a batch, and join the unreadable and the unusual files."""
    good: list[Sample] = []
    unreadable: dict[str, str] = {}
    unusual: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample, InputError):
            return Batch(torch.empty(0), None, {}, {}, {}, sample)
        good.append(sample)
        unreadable |= sample.unreadable
        unusual |= sample.unusual
    images = [sample.image for sample in good]
    alike = len({image.dtype for image in images}) == 1
    targets = {name: torch.stack([sample.targets[name] for sample in good]) for name in good[0].targets}
    stacked = torch.stack(images if alike else [image.float() for image in images])
    return Batch(stacked, values_in(stacked), targets, unreadable, unusual)
