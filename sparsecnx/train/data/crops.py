"""The crops that a run trains on.

Every random choice is a function of the seed and of its place in the run. A run that was stopped therefore goes on
exactly as it would have, with any number of workers:

    order of an epoch    (seed, epoch)
    crop and flip        (seed, epoch, position in the epoch)
    mask                 (seed, forward pass), drawn in loop.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.augment import SMALLEST_AREA, random_flip, random_resized_crop
from sparsecnx.train.data.files import FileSet
from sparsecnx.train.data.images import read_image
from sparsecnx.train.recipe import MAX_PIXELS, Recipe

T = TypeVar("T")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images `(B, 3, H, W)` as float32, normalised by ImageNet's mean and standard deviation.

    Volumes, which are floating, are normalised one by one when they are read, and are returned as they are.
    """
    if images.is_floating_point():
        return images
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed from several numbers or words; similar inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draw(NamedTuple):
    """One sample to make: the number of the image, and the seed of its crop and flip."""

    image: int
    seed: int


class Batch(NamedTuple):
    """One batch of crops.

    Attributes:
        images: uint8 `(B, 3, *size)`, of volumes float32 `(B, C, *size)`; empty if `problem` is set.
        unreadable: the files that were skipped, and why.
        problem: the reason why there is no batch. A worker that raised it would send a traceback in words instead.
    """

    images: Tensor
    unreadable: dict[str, str]
    problem: InputError | None = None


class Crops(Dataset[Any]):
    """Augmented crops of an image set, indexed by `Draw`; equal draws give equal crops.

    The next readable file takes the place of an unreadable one, so that batches stay full.
    """

    def __init__(
        self,
        images: FileSet,
        size: tuple[int, ...],
        max_pixels: int = MAX_PIXELS,
        smallest: float = SMALLEST_AREA,
    ) -> None:
        self.images = images
        self.size = size
        self.max_pixels = max_pixels
        self.smallest = smallest
        self.decoded: dict[int, Tensor] = {}

    def __getitem__(self, draw: Draw) -> tuple[Tensor, dict[str, str]] | InputError:
        try:
            return self._readable(draw.image, lambda place: self.crop(place, draw.seed))
        except InputError as error:
            return error

    def crop(self, place: int, seed: int) -> Tensor:
        """Return a crop of image `place`, drawn from a seed."""
        pixels = self.whole(place)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return random_flip(random_resized_crop(pixels, self.size, self.smallest))

    def read(self, index: int) -> tuple[Any, dict[str, str]]:
        """Return image `index`, or the first readable one after it, and the files that were skipped with the reasons.

        Raises:
            InputError: no file can be read.
        """
        return self._readable(index, self.whole)

    def whole(self, place: int) -> Any:
        """Return image `place`. A small one is decoded once."""
        if place in self.decoded:
            return self.decoded[place]
        pixels = read_image(self.images.path(place), self.max_pixels)
        if self.images.small:
            self.decoded[place] = pixels
        return pixels

    def _readable(self, index: int, make: Callable[[int], T]) -> tuple[T, dict[str, str]]:
        """Return what `make` returns for file `index` or the first one after it for which it raises nothing."""
        unreadable: dict[str, str] = {}
        for place in range(index, index + len(self.images.names)):
            place %= len(self.images.names)
            try:
                return make(place), unreadable
            except Exception as error:  # decoders raise many kinds of errors, and none may end a long run
                unreadable[self.images.names[place]] = f"{type(error).__name__}: {error}"
        name, reason = next(iter(unreadable.items()))
        noun = self.images.noun
        problem = f"none of its {len(unreadable)} {noun} files can be read, first {name} ({reason})"
        raise InputError("data", self.images.root, problem)


def draws(recipe: Recipe, images: int, *, start: int = 0) -> Iterator[list[Draw]]:
    """Yield the draws of every batch of a run, from batch `start` to the end of the last epoch.

    An epoch shows each image `epoch_repeats` times, shuffled.
    """
    batches_per_epoch = recipe.steps_per_epoch(images) * recipe.grad_accum_steps
    for number in range(start, recipe.epochs * batches_per_epoch):
        epoch, batch = divmod(number, batches_per_epoch)
        if batch == 0 or number == start:
            generator = torch.Generator().manual_seed(mix(recipe.seed, "order", epoch))
            order = (torch.randperm(images * recipe.epoch_repeats, generator=generator) % images).tolist()
        positions = range(batch * recipe.batch_size, (batch + 1) * recipe.batch_size)
        yield [Draw(order[position], mix(recipe.seed, "crop", epoch, position)) for position in positions]


def collate(samples: list[tuple[Tensor, dict[str, str]] | InputError]) -> Batch:
    """Stack the crops of a batch and join the unreadable files."""
    images: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample, InputError):
            return Batch(torch.empty(0), {}, sample)
        images.append(sample[0])
        unreadable |= sample[1]
    return Batch(torch.stack(images), unreadable)
