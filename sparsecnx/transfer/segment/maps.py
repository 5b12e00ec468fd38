"""Images with label maps: which there are, and their division into a part to train on and a part to test on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.address import parse
from sparsecnx.train.data.files import ENDINGS, FileSet, find_files, hashed
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.pictures import expect_size, open_picture, orientation
from sparsecnx.train.data.source import Fingerprint, Source
from sparsecnx.train.data.target_values import UnsupportedTarget, as_array
from sparsecnx.train.data.volumes import open_volume
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.targets import IMAGE
from sparsecnx.transfer.labels import TEST_SHARE, Part, both_parts
from sparsecnx.transfer.segment.recipe import MAPS

IMAGES = "images"  # folder of the images, beside that of the label maps
CLASSES = "classes.txt"  # beside both, names the classes
FORM = f"expected {IMAGES} and {MAPS}, with a map of the same name for each image"


class Mapped(NamedTuple):
    """Hold images with label maps.

    Attributes:
        source: it reads both.
        names: of all classes.
    """

    source: Source
    names: tuple[str, ...]


@dataclass(frozen=True)
class MapSet(FileSet):
    """Files of label maps, in a fixed order.

    Attributes:
        ndim: dimensions of the maps.
    """

    ndim: int = 2

    def read(self, index: int, recipe: Recipe) -> Tensor:
        return torch.from_numpy(self.map(index))

    def map(self, index: int) -> NDArray[Any]:
        """Return a label map, as `read_map` does."""
        return read_map(self.path(index), self.ndim)


class MapFiles(Part):
    """Images of a folder, with label maps of the same names in another one.

    Args:
        folder: the folder of both.
        images: reads the images.
        maps: reads their label maps, in the same order.
    """

    def __init__(self, folder: str, images: FileSet, maps: MapSet) -> None:
        super().__init__(images, np.arange(len(images)))
        self.root, self.images, self.maps = folder, images, maps

    @property
    def place(self) -> str | None:
        return os.path.abspath(self.root)

    def values(self, index: int) -> Mapping[str, Any]:
        return {MAPS: self.maps.map(index)}

    def turned(self, index: int) -> Mapping[str, int]:
        paths = {IMAGE: self.images.path(index), MAPS: self.maps.path(index)}
        return {name: _orientation(path) for name, path in paths.items()}

    def fingerprint(self) -> Fingerprint:
        both = zip(self.images.fingerprint(), self.maps.fingerprint(), strict=True)
        return Fingerprint(*(hashed([one.encode(), other.encode()]) for one, other in both))


def find_maps(
    data: str, test: str | None = None, reading: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Source, Source]:
    """Return the images to train on and those to test on, which have label maps as `values`.

    Args:
        data: a folder with the folders `images` and `labels`, or one with `train` and `val` of that form; or
            `python:module:function`, whose items are dicts of an `image` and `labels`.
        test: likewise, what to test on; None for `val`, `validation` or `test` below `data`, or for a fifth of the
            images, always the same ones.
        reading: arguments of `find_source`, see `how_read`.

    Raises:
        InputError: an image has no map or two, a map has no image, or there is nothing to test on.
    """
    data, test = both_parts(data, test)
    whole = _opened(data, "data", reading)
    if test is not None:
        return whole, _opened(test, "test", reading)
    if len(whole) < 2:
        raise InputError("data", data, "has one image; expected two or more, or --test")
    order = np.random.default_rng(0).permutation(len(whole))
    number = max(1, round(TEST_SHARE * len(whole)))
    return Part(whole, np.sort(order[number:])), Part(whole, np.sort(order[:number]))


def class_names(data: str, number: int | None) -> tuple[str, ...]:
    """Return the names of the classes: those of `classes.txt` in a folder or in the one above, or numbers.

    Args:
        data: see `find_maps`.
        number: of classes, where the user gives it.

    Raises:
        InputError: nothing says how many classes there are, or both do and differ.
    """
    places = [] if parse(data) is not None else [Path(data, CLASSES), Path(data).absolute().parent / CLASSES]
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        if number is None:
            expected = f"expected the number of classes, or the file {CLASSES} in {data} with the name of one a line"
            raise InputError("num_classes", None, expected)
        return tuple(map(str, range(number)))
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if number not in (None, len(names)):
        raise InputError("num_classes", number, f"expected {len(names)}, those of {file}, or another file")
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError("data", data, f"has {len(names)} names in {file}; expected two or more different ones")
    return names


def read_map(path: str, ndim: int) -> NDArray[Any]:
    """Return a label map, as whole numbers `(*sides)`.

    Args:
        path: a picture of one channel, or an array.
        ndim: dimensions of the map.

    Raises:
        UnsupportedTarget: it holds other numbers.
        Exception: whatever the decoder raises.
    """
    if not path.lower().endswith(ENDINGS["images"]):
        volume = open_volume(path, ndim, in_chans=1)
        values = volume.read((0,) * ndim, volume.size)[0].numpy()
        if not np.array_equal(values, np.trunc(values)):
            raise UnsupportedTarget(f"has {MAPS} with values between whole numbers: expected classes")
        return values.astype(np.int64)
    with open_picture(path) as image:
        expect_size(image.width, image.height)
        return as_array(image)


def _opened(data: str, argument: str, reading: Mapping[str, Any]) -> Source:
    """Return a source with label maps; errors name `argument`."""
    try:
        if parse(data) is None:
            return _folder(data, reading)
        source = find_source(data, **reading)
        source.values(0)
    except InputError as error:
        expected = (
            f"expected a folder with {IMAGES} and {MAPS}, or python:module:function, whose items are dicts of both"
        )
        problem = f"holds no label maps; {expected}" if error.argument == "targets" else str(error.args[-1])
        raise InputError(argument, data if error.argument == "targets" else error.args[1], problem) from error
    return source


def _folder(data: str, reading: Mapping[str, Any]) -> Source:
    for name in (IMAGES, MAPS):
        if not os.path.isdir(os.path.join(data, name)):
            raise InputError("data", data, f"has no folder {name}; {FORM}")
    images: Any = find_source(os.path.join(data, IMAGES), **reading)
    if reading.get("pages") == "images":
        raise InputError("pages", "images", "expected channels, since a label map belongs to a file")
    root = os.path.join(data, MAPS)
    found = find_files(root)
    maps: dict[str, str] = {}
    for name in sorted((*found["images"], *found["volumes"])):
        if (other := maps.setdefault(_stem(name), name)) != name:
            raise InputError("data", data, f"holds {MAPS}/{other} and {MAPS}/{name}; {FORM}")
    stems = [_stem(name) for name in images.names]
    for stem, name in zip(stems, images.names, strict=True):
        if stem not in maps:
            raise InputError("data", data, f"holds {IMAGES}/{name} and no map of that name; {FORM}")
    if alone := sorted(maps.keys() - set(stems)):
        raise InputError("data", data, f"holds {MAPS}/{maps[alone[0]]} and no image of that name; {FORM}")
    ordered = tuple(maps[stem] for stem in stems)
    return MapFiles(data, images, MapSet(root, ordered, ndim=getattr(images, "ndim", 2)))


def _stem(name: str) -> str:
    """Return the name of a file without its ending."""
    endings = "|".join(re.escape(ending) for kind in ENDINGS.values() for ending in sorted(kind, key=len, reverse=True))
    return re.sub(rf"({endings}|\.zarr)$", "", name, flags=re.IGNORECASE)


def _orientation(path: str) -> int:
    """Return the EXIF orientation of a picture, 1 of an array."""
    if not path.lower().endswith(ENDINGS["images"]):
        return 1
    with open_picture(path) as image:
        return orientation(image)
