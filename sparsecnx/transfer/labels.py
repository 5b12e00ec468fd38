"""Labelled images: the classes of a source, and its division into a part to train on and a part to test on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.files import hashed
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.source import Fingerprint, Pixels, Source
from sparsecnx.train.recipe import Recipe

# Folders below `--data` of these names are the images to train on and those to test on.
TRAINING, TESTING = "train", ("val", "validation", "test")
MOST_CLASSES = 100_000
TEST_SHARE = 0.2  # of images that come without a part to test on


class Part(Source):
    """Some entries of a source.

    Args:
        whole: the source.
        places: numbers of the entries in it, sorted.
    """

    def __init__(self, whole: Source, places: NDArray[Any]) -> None:
        self.whole, self.places = whole, places
        self.root, self.noun, self.small = whole.root, whole.noun, whole.small

    @property
    def place(self) -> str | None:
        return self.whole.place

    @property
    def seen(self) -> list[tuple[float, float]]:
        return self.whole.seen

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return self.whole.name(self._place(index))

    def read(self, index: int, recipe: Recipe) -> Tensor | Pixels:
        return self.whole.read(self._place(index), recipe)

    def values(self, index: int) -> Mapping[str, Any]:
        return self.whole.values(self._place(index))

    def turned(self, index: int) -> Mapping[str, int]:
        return self.whole.turned(self._place(index))

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.whole.defaults(given)

    def fingerprint(self) -> Fingerprint:
        """Return the hashes of the whole, and which entries are taken of it."""
        whole = self.whole.fingerprint()
        return whole._replace(names=hashed([whole.names.encode(), self.places.astype("<i8").tobytes()]))

    def check(self, recipe: Recipe) -> None:
        self.whole.check(recipe)

    def describe(self, recipe: Recipe, given: Mapping[str, Any] | None) -> list[str]:
        return self.whole.describe(recipe, given)

    def _place(self, index: int) -> int:
        return int(self.places[index])


class Labelled(NamedTuple):
    """Hold images with classes.

    Attributes:
        source: it reads the images.
        classes: numbers of their classes among `names`, int64 `(N,)`.
        names: of all classes, those of other parts too.
    """

    source: Source
    classes: NDArray[Any]
    names: tuple[str, ...]

    def part(self, places: NDArray[Any]) -> Labelled:
        """Return some of the images."""
        return self._replace(source=Part(self.source, places), classes=self.classes[places])


def how_read(recipe: Recipe) -> dict[str, Any]:
    """Return how the images of a recipe are read, for `find_source`."""
    return {"ndim": recipe.ndim, "photographs": recipe.of_images, "pages": recipe.pages, "in_chans": recipe.in_chans}


def find_labelled(
    data: str, test: str | None = None, reading: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Labelled, Labelled]:
    """Return the images to train on and those to test on.

    Args:
        data: a folder with a folder of images for each class, or one with `train` and `val` of that form; or an address
            of a data set with labels, see `find_source`.
        test: likewise, what to test on; None for `val`, `validation` or `test` below `data`, or for a fifth of the
            images, drawn class by class, always the same ones.
        reading: arguments of `find_source`, see `how_read`.

    Raises:
        InputError: an image has no class, there is only one class, or the two parts differ in their classes.
    """
    data, test = both_parts(data, test)
    source, named = open_labelled(data, "data", reading)
    names = tuple(sorted(set(named), key=_in_order))
    if not 2 <= len(names) <= MOST_CLASSES:
        problem = f"has {len(names)} classes ({', '.join(names[:3])}); expected 2 to {MOST_CLASSES}"
        raise InputError("data", data, problem)
    numbers = {name: number for number, name in enumerate(names)}
    whole = Labelled(source, np.array([numbers[name] for name in named]), names)
    if test is None:
        return _divided(whole, data)
    other, others = open_labelled(test, "test", reading)
    for one, argument, missing, where in (
        (test, "test", set(others) - set(names), data),
        (data, "data", set(names) - set(others), test),
    ):
        if missing:
            first = sorted(missing, key=_in_order)[0]
            problem = f"has the class {first}, and {where} has not; expected the same classes in both"
            raise InputError(argument, one, problem)
    return whole, Labelled(other, np.array([numbers[name] for name in others]), names)


def both_parts(data: str, test: str | None) -> tuple[str, str | None]:
    """Return `train` and `val` below a folder, where it has them and nothing else is named, see `find_labelled`.

    Raises:
        InputError: there is a part to train on, and none or several to test on.
    """
    if test is not None or not os.path.isdir(os.path.join(data, TRAINING)):
        return data, test
    found = [name for name in TESTING if os.path.isdir(os.path.join(data, name))]
    if len(found) != 1:
        expected = f"expected one folder of {', '.join(TESTING)} beside {TRAINING}, or --test"
        raise InputError("data", data, f"has {', '.join(found) or 'none'} beside {TRAINING}; {expected}")
    return os.path.join(data, TRAINING), os.path.join(data, found[0])


def subset(classes: NDArray[Any], share: float, seed: int) -> NDArray[Any]:
    """Return the places of a share of images, drawn class by class, at least one of each, sorted."""
    generator = np.random.default_rng([seed, round(share * 1e6)])
    chosen = []
    for number in np.unique(classes):
        of_class = np.flatnonzero(classes == number)
        chosen.append(generator.permutation(of_class)[: max(1, round(share * len(of_class)))])
    return np.sort(np.concatenate(chosen))


def fingerprint(labelled: Labelled) -> Fingerprint:
    """Return the hashes of images, and of their classes with the names."""
    found = labelled.source.fingerprint()
    return found._replace(names=hashed([found.names.encode(), labelled.classes.astype("<i8").tobytes()]))


def share_of(labelled: Labelled, recipe: Any) -> Labelled:
    """Return the images whose labels a recipe trains on."""
    return labelled if recipe.labels == 1 else labelled.part(subset(labelled.classes, recipe.labels, recipe.seed))


def open_labelled(data: str, argument: str, reading: Mapping[str, Any]) -> tuple[Source, Sequence[str]]:
    """Return a source and the names of the classes of its entries, see `find_labelled`; errors name `argument`."""
    try:
        source = find_source(data, **reading)
        return source, source.labels()
    except InputError as error:
        raise InputError(argument, *error.args[1:]) from error


def _divided(whole: Labelled, data: str) -> tuple[Labelled, Labelled]:
    counts = np.bincount(whole.classes)
    if counts.min() < 2:
        rare = whole.names[int(counts.argmin())]
        raise InputError("data", data, f"has one image of the class {rare}; expected two or more, or --test")
    tested = subset(whole.classes, TEST_SHARE, 0)
    return whole.part(np.setdiff1d(np.arange(len(whole.classes)), tested)), whole.part(tested)


def _in_order(name: str) -> tuple[bool, int, str]:
    """Return what sorts numbers by their size, before words."""
    number = name.isdecimal() and len(name) < 20
    return not number, int(name) if number else 0, name
