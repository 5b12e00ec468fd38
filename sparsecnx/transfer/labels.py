"""Labelled images: the classes of a source, and its division into a part to train on and a part to test on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.source import Source
from sparsecnx.train.recipe import Recipe

# Folders below `--data` of these names are the images to train on and those to test on.
TRAINING, TESTING = "train", ("val", "validation", "test")
MOST_CLASSES = 100_000
TEST_SHARE = 0.2  # of images that come without a part to test on


class Labelled(NamedTuple):
    """Hold a part of a data set.

    Attributes:
        source: it reads the images.
        places: numbers of the images in `source`, int64 `(N,)`.
        classes: numbers of their classes among `names`, int64 `(N,)`.
        names: of all classes, those of the other part too.
    """

    source: Source
    places: NDArray[Any]
    classes: NDArray[Any]
    names: tuple[str, ...]


def find_labelled(data: str, test: str | None, recipe: Recipe, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Return the images to train on and those to test on.

    Args:
        data: a folder with a folder of images for each class, or one with `train` and `val` of that form; or an address
            of a data set with labels, see `find_source`.
        test: likewise, what to test on; None for `val`, `validation` or `test` below `data`, or for a fifth of the
            images, drawn by `seed` class by class.
        recipe: says how the images are read.
        seed: see `test`.

    Raises:
        InputError: an image has no class, there is only one class, or the two parts differ in their classes.
    """
    if test is None and os.path.isdir(os.path.join(data, TRAINING)):
        found = [name for name in TESTING if os.path.isdir(os.path.join(data, name))]
        if len(found) != 1:
            expected = f"expected one folder of {', '.join(TESTING)} beside {TRAINING}, or --test"
            raise InputError("data", data, f"has {', '.join(found) or 'none'} beside {TRAINING}; {expected}")
        data, test = os.path.join(data, TRAINING), os.path.join(data, found[0])
    source, named = _open(data, "data", recipe)
    names = tuple(sorted(set(named), key=_in_order))
    if not 2 <= len(names) <= MOST_CLASSES:
        problem = f"has {len(names)} classes ({', '.join(names[:3])}); expected 2 to {MOST_CLASSES}"
        raise InputError("data", data, problem)
    numbers = {name: number for number, name in enumerate(names)}
    whole = Labelled(source, np.arange(len(named)), np.array([numbers[name] for name in named]), names)
    if test is None:
        return _divided(whole, data, seed)
    other, others = _open(test, "test", recipe)
    for one, argument, missing, where in (
        (test, "test", set(others) - set(names), data),
        (data, "data", set(names) - set(others), test),
    ):
        if missing:
            first = sorted(missing, key=_in_order)[0]
            problem = f"has the class {first}, and {where} has not; expected the same classes in both"
            raise InputError(argument, one, problem)
    return whole, Labelled(other, np.arange(len(others)), np.array([numbers[name] for name in others]), names)


def subset(classes: NDArray[Any], share: float, seed: int) -> NDArray[Any]:
    """Return the places of a share of images, drawn class by class, at least one of each, sorted."""
    generator = np.random.default_rng([seed, round(share * 1e6)])
    chosen = []
    for number in np.unique(classes):
        of_class = np.flatnonzero(classes == number)
        chosen.append(generator.permutation(of_class)[: max(1, round(share * len(of_class)))])
    return np.sort(np.concatenate(chosen))


def _open(data: str, argument: str, recipe: Recipe) -> tuple[Source, Sequence[str]]:
    try:
        source = find_source(data, recipe.ndim, recipe.of_images, recipe.pages, recipe.in_chans)
        return source, source.labels()
    except InputError as error:
        raise InputError(argument, *error.args[1:]) from error


def _divided(whole: Labelled, data: str, seed: int) -> tuple[Labelled, Labelled]:
    counts = np.bincount(whole.classes)
    if counts.min() < 2:
        rare = whole.names[int(counts.argmin())]
        raise InputError("data", data, f"has one image of the class {rare}; expected two or more, or --test")
    tested = subset(whole.classes, TEST_SHARE, seed)
    trained = np.setdiff1d(whole.places, tested)
    first, second = (whole._replace(places=part, classes=whole.classes[part]) for part in (trained, tested))
    return first, second


def _in_order(name: str) -> tuple[bool, int, str]:
    """Return what sorts numbers by their size, before words."""
    number = name.isdecimal() and len(name) < 20
    return not number, int(name) if number else 0, name
