"""The crops that a run trains on.

Every random choice is a function of the seed and of its place in the run. A run that was stopped therefore goes on
exactly as it would have, with any number of workers:

    order of an epoch    (seed, epoch)
    crop and flip        (seed, epoch, position in the epoch)
    mask                 (seed, forward pass), drawn in loop.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsecnx.common.errors import InputError
from sparsecnx.train.augment import SMALLEST_AREA, random_flip, random_resized_crop
from sparsecnx.train.images import ImageSet, read_image
from sparsecnx.train.recipe import MAX_PIXELS, Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images `(B, 3, H, W)` as float32, normalised by ImageNet's mean and standard deviation."""
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
        images: uint8 `(B, 3, *size)`; empty if `problem` is set.
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
        images: ImageSet,
        size: tuple[int, int],
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
            pixels, unreadable = self.read(draw.image)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)
            return random_flip(random_resized_crop(pixels, self.size, self.smallest)), unreadable

    def read(self, index: int) -> tuple[Tensor, dict[str, str]]:
        """Return image `index`, or the first readable one after it, and the files that were skipped with the reasons.

        Raises:
            InputError: no file can be read.
        """
        unreadable: dict[str, str] = {}
        for place in range(index, index + len(self.images.names)):
            place %= len(self.images.names)
            if place in self.decoded:
                return self.decoded[place], unreadable
            try:
                pixels = read_image(self.images.path(place), self.max_pixels)
            except Exception as error:  # decoders raise many kinds of errors, and none may end a long run
                unreadable[self.images.names[place]] = f"{type(error).__name__}: {error}"
                continue
            if self.images.small:
                self.decoded[place] = pixels
            return pixels, unreadable
        name, reason = next(iter(unreadable.items()))
        problem = f"none of its {len(unreadable)} image files can be read, first {name} ({reason})"
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
