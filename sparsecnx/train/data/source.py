"""What a run reads: the interface of every source of images or volumes.

A source has entries, numbered from 0 in an order that never changes. It says what they are and reads one of them. The
crops, the order and the masks are not its business: they are made by `Crops` and by the loop, from the numbers alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.order import around, mix, shuffled
from sparsecnx.train.recipe import Recipe

# This many entries, spread evenly over all, are looked at before a run begins.
SAMPLED_ENTRIES = 256
# So few channels are taken for channels where the other end of an array is longer, and so many are none.
FEW_BANDS, MANY_BANDS = 32, 512


class Fingerprint(NamedTuple):
    """Hashes that tell one data set from another, wherever it lies.

    Attributes:
        names: of the names and their order.
        sizes: of the sizes of all files, in bytes.
        contents: of the first, middle and last 4096 bytes of up to 256 files, spread evenly over the list. Of a Zarr
            array, which is a folder, it takes the first, middle and last file in this way.
    """

    names: str
    sizes: str
    contents: str


class Pixels(Protocol):
    """An entry of which boxes are read: a decoded image, or an array in a file."""

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> tuple[int, ...]:
        """Return the side on each axis of space."""
        ...

    @property
    def bytes_held(self) -> int:
        """Return the memory that a reading process holds to read no second time, 0 where it reads boxes from disk."""
        ...

    def read(self, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the values of a box, uint8 or float32 `(C, *size)`, in the units of the file."""
        ...


@dataclass(frozen=True)
class Decoded:
    """An image in memory.

    Attributes:
        values: uint8 or float32 `(C, *size)`.
    """

    values: Tensor
    bytes_held: int = 0

    @property
    def channels(self) -> int:
        return len(self.values)

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def read(self, start: Sequence[int], size: Sequence[int]) -> Tensor:
        box = (slice(first, first + side) for first, side in zip(start, size, strict=True))
        return self.values[tuple([slice(None), *box])]


def spread(number: int) -> list[int]:
    """Return up to `SAMPLED_ENTRIES` of so many numbers from 0, spread evenly."""
    count = min(number, SAMPLED_ENTRIES)
    return [i * number // count for i in range(count)]


def channels_last(first: int, last: int, in_chans: int | None) -> bool:
    """Return whether the channels of an array are its last axis, and not its first.

    They are the axis as long as `in_chans`, if exactly one is. Otherwise they are the shorter one, and of two equal
    ones the first.

    Args:
        first, last: lengths of both axes.
        in_chans: the channels that the user or a recipe names.

    Raises:
        ValueError: nothing tells a side of an image from many bands.
    """
    if (first == in_chans) != (last == in_chans):
        return last == in_chans
    least, most = sorted((first, last))
    if least > FEW_BANDS and most <= MANY_BANDS and in_chans != first:
        expected = " or ".join(dict.fromkeys(f"--in-chans {length}" for length in (first, last)))
        raise ValueError(f"{first} or {last} channels: expected {expected}, which tells")
    return last < first


def too_small(size: Sequence[int], recipe: Recipe) -> str | None:
    """Return why an image or a volume of a size has no crop of a recipe, or None. Where crops are resized, it has."""
    if recipe.crop_area is not None or all(side >= part for side, part in zip(size, recipe.size, strict=True)):
        return None
    others = ", --crop-area enlarges it" if recipe.ndim == 2 else "; or pad it, or move it elsewhere"
    remedy = f"a smaller --image-size takes it in{others}"
    if len(size) == 3 and 1 in size:
        remedy = "it has one slice, and is an image: --image-size HEIGHTxWIDTH trains on images, from arrays (C, H, W)"
    whole, crop = (" x ".join(map(str, sides)) for sides in (size, recipe.size))
    return f"is {whole}, smaller than the crop of {crop}; {remedy}"


class Source(ABC):
    """Images or volumes in a fixed order.

    Attributes:
        root: what messages call it, such as its folder.
        place: what `find_source` finds it by again, which checkpoints keep; None for the photographs in the wheels.
        noun: what messages call an entry.
        small: True if the decoded entries are kept in memory.
        ahead: how many entries before one is read `expect` is told of it; 0 for never.
        ordered_by_rank: True if the order depends on the number of ranks.
    """

    root: str
    noun: str = "image"
    small: bool = False
    ahead: int = 0
    ordered_by_rank: bool = False

    @property
    def place(self) -> str | None:
        return self.root

    @cached_property
    def seen(self) -> list[tuple[float, float]]:
        """Return the least and the largest value of each channel of the sample, NaN where a channel has none.

        It is empty until the sample was measured, see `measure`.
        """
        return []

    @cached_property
    def gaps(self) -> dict[str, bool]:
        """Return of the entries whose values were read before the run, by name, whether some are missing."""
        return {}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of entries."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an entry, which messages about it begin with. It raises nothing."""

    @abstractmethod
    def read(self, index: int, recipe: Recipe) -> Tensor | Pixels:
        """Return an entry, of the channels of the recipe.

        An image is uint8 or float32 `(C, *size)`, in the units of the file. What is large may be an object that reads
        boxes.

        Raises:
            InputError: the run cannot go on.
            Exception: anything, where the entry cannot be read. A run skips it and names it with the error's words.
        """

    def values(self, index: int) -> Mapping[str, Any]:
        """Return what an entry holds beside its image, by name, see `Recipe.targets`.

        Raises:
            InputError: the source has images alone.
            Exception: see `read`.
        """
        expected = "expected --data python:module:function, whose items are dicts of an image and targets"
        raise InputError("targets", self.root, f"holds {self.noun}s alone; {expected}")

    def turned(self, index: int) -> Mapping[str, int]:
        """Return the EXIF orientation of an image, under `image`, and of the pictures beside it, by name."""
        return {}

    def labels(self) -> list[str]:
        """Return the name of the class of every entry.

        Raises:
            InputError: an entry has no class.
        """
        expected = "expected a folder of files for each class, or a data set whose items have labels"
        raise InputError("data", self.root, f"holds {self.noun}s without classes; {expected}")

    def order(self, seed: int, epoch: int, repeats: int, batch: int, ranks: int) -> Tensor:
        """Return the entries of an epoch in the order in which it shows them, int64 `(N,)`.

        Each rank reads its part of every batch. Here the order is the same whatever the batch and the ranks.

        Args:
            seed: of the run.
            epoch: number of the epoch.
            repeats: times that an epoch shows each entry.
            batch: entries of a forward pass over all ranks.
            ranks: processes of the run.
        """
        return shuffled(len(self), repeats, seed, epoch)

    def instead(self, index: int, seed: int) -> Iterator[int]:
        """Yield all entries, one that cannot be read first, then those that take its place, others for each entry."""
        return around(index, len(self), mix(seed, "instead", index))

    def expect(self, entries: Sequence[int]) -> None:
        """Take note, in the process that draws the batches, of entries that reading processes will read soon."""
        return

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Return hashes by which a resumed run knows its data."""

    def sample(self) -> list[int]:
        """Return the numbers of up to `SAMPLED_ENTRIES` entries, spread evenly."""
        return spread(len(self))

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a recipe that follow from the data, where they differ from those of photographs.

        Args:
            given: the fields that the user chose.

        Raises:
            InputError: the entries do not fit together, or not what was chosen.
        """
        return {}

    def check(self, recipe: Recipe) -> None:
        """Look at a sample before the first step.

        Raises:
            InputError: an entry is of a kind that cannot be trained on, or does not fit the recipe. What is damaged is
                not refused: a run skips it and names it.
        """
        return

    def describe(self, recipe: Recipe, given: Mapping[str, Any] | None) -> list[str]:
        """Return what was understood of the data, for the first lines of a run, without the number and the crops.

        Args:
            recipe: that of the run.
            given: the fields that the user chose; None for a resumed run.
        """
        return []
