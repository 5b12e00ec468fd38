"""Image files: which there are, and what was understood of them."""

from __future__ import annotations

import importlib.util
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.train.data.files import ENDINGS, FileSet
from sparsecnx.train.data.formats import Header, decode, expect_fit, read_header
from sparsecnx.train.data.pictures import File, UnsupportedImage
from sparsecnx.train.data.source import Source, too_small
from sparsecnx.train.data.statistics import KNOWN_RANGES, describe_gaps, describe_scale, looked_at, measure
from sparsecnx.train.recipe import Recipe

# These are the photographs (no drawings, no masks) inside the wheels, colourful ones first.
PHOTOGRAPHS = {
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "skimage": """
        data/astronaut.png data/chelsea.png data/coffee.png data/rocket.jpg data/motorcycle_left.png
        data/motorcycle_right.png data/hubble_deep_field.jpg data/ihc.png data/retina.jpg data/camera.png
        data/coins.png data/brick.png data/grass.png data/gravel.png data/moon.png data/page.png
        data/text.png data/cell.png data/clock_motion.png data/microaneurysms.png""",
}
# An epoch shows each of the 22 photographs this often, so that it has a few hundred images.
PHOTOGRAPH_REPEATS = 20


class Images(Source):
    """Images of any channels and depth, which say what they are before they are decoded.

    Attributes:
        in_chans: channels that the user or a recipe names, which tell the axis of channels in arrays.
    """

    in_chans: int | None = None

    @abstractmethod
    def header(self, index: int) -> Header:
        """Return what is known of an image before it is decoded.

        Raises:
            Exception: as `formats.read_header` does.
        """

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        headers = dict(self.headers)
        dtypes, nodata = {header.dtype for header in headers.values()}, given.get("nodata")
        if dtypes and nodata is not None and not any(_holds(dtype, nodata) for dtype in dtypes):
            raise InputError("nodata", nodata, f"expected a number that {' or '.join(sorted(dtypes))} can hold")
        own = any(given.get(field) is not None for field in ("value_range", "mean", "std", "nodata"))
        pictures = all(header.picture for header in headers.values()) and not own
        if pictures and given.get("in_chans", 3) == 3 and given.get("normalize", "imagenet") == "imagenet":
            return {}
        found: dict[str, Any] = {
            "in_chans": given.get("in_chans") or self._channels(headers, given.get("pages")),
            "normalize": given.get("normalize", "dataset"),
        }
        if found["normalize"] != "dataset":
            return found
        return found | measure(self, {**given, **found}, [header.dtype for header in headers.values()])

    def check(self, recipe: Recipe) -> None:
        """Look at the headers of a sample. Files that are damaged or no images are not refused here."""
        for name, header in self.headers:
            try:
                expect_fit(header, recipe.in_chans, recipe.pages, recipe.max_pixels, self.types(recipe))
            except UnsupportedImage as error:
                raise InputError("data", self.root, f"holds {name}, which {error}") from error
            if (problem := too_small((header.height, header.width), recipe)) is not None:
                raise InputError("data", self.root, f"holds {name}, which {problem}")

    @cached_property
    def looked_at(self) -> list[tuple[str, Header | UnsupportedImage | str]]:
        """Return the names and headers of a sample; of a file that cannot be read the reason."""
        found: list[tuple[str, Header | UnsupportedImage | str]] = []
        for index in self.sample():
            try:
                header: Header | UnsupportedImage | str = self.header(index)
            except UnsupportedImage as error:
                header = error
            except (MissingExtra, InputError):
                raise
            except Exception as error:  # decoders raise many kinds of errors; a run skips such files and names them
                header = f"{type(error).__name__}: {error}"
            found.append((self.name(index), header))
        return found

    @property
    def headers(self) -> list[tuple[str, Header]]:
        """Return the names and headers of a sample, without files that cannot be read.

        Raises:
            InputError: one is of a kind that cannot be trained on.
        """
        for name, found in self.looked_at:
            if isinstance(found, UnsupportedImage):
                raise InputError("data", self.root, f"holds {name}, which {found}") from found
        return [(name, found) for name, found in self.looked_at if isinstance(found, Header)]

    def types(self, recipe: Recipe) -> set[str] | None:
        """Return the types of values that fit a recipe; None for all.

        The numbers of ImageNet are of 8 bits. Those of a data set are of the type of its sample, unless a range that
        was given says what fits.
        """
        if recipe.photographs:
            return {"uint8"}
        if recipe.normalize != "dataset":
            return None
        sampled = {found.dtype for _, found in self.looked_at if isinstance(found, Header)}
        known = len(sampled) == 1 and recipe.value_range == KNOWN_RANGES.get(*sampled)
        return sampled if known else None

    def _channels(self, headers: Mapping[str, Header], pages: str | None) -> int:
        """Return the channels of the images, which must be the same in all."""
        found: dict[int, str] = {}
        for name, header in headers.items():
            found.setdefault(header.channels_as(pages), name)
        if len(found) > 1:
            (one, first), (two, second), *_ = found.items()
            remedy = "expected the same in all; --in-chans 1 or 3 makes grey and RGB one, other bands need own folders"
            problem = f"holds {first} of {one} channels and {second} of {two}; {remedy}"
            raise InputError("data", self.root, problem)
        return next(iter(found), 3)

    def describe(self, recipe: Recipe, given: Mapping[str, Any] | None) -> list[str]:
        headers = [header for _, header in self.headers]
        unreadable = [(name, found) for name, found in self.looked_at if isinstance(found, str)]
        told = looked_at(Counter(map(_kind, headers)), unreadable)
        channels = f"{recipe.in_chans} channel{'s' if recipe.in_chans > 1 else ''}"
        imagenet = ", normalised by the numbers of ImageNet" if recipe.photographs else ""
        lines = [f"{told}; as {channels}{imagenet}, upright as their EXIF data say"]
        marks = {header.nodata for header in headers} | {recipe.nodata}
        numbers = [mark for mark in marks if mark is not None]
        lines += describe_gaps(self, recipe, {header.dtype for header in headers}, numbers)
        small = sum(h.height < recipe.size[0] or h.width < recipe.size[1] for h in headers)
        if small and recipe.crop_area is not None:
            lines.append(f"{small} of them are smaller than the crop and are enlarged")
        return [*lines, *describe_scale(recipe, given, self.seen)]


class ImageFiles(Images):
    """Images that are files, on disk or in memory."""

    @abstractmethod
    def file(self, index: int) -> File:
        """Return the name of a file, or what is in it.

        Raises:
            Exception: anything, where there is none.
        """

    def header(self, index: int) -> Header:
        return read_header(self.file(index))

    def read(self, index: int, recipe: Recipe) -> Tensor:
        return self._decoded(index, 0, recipe)

    def _decoded(self, index: int, page: int, recipe: Recipe) -> Tensor:
        types = self.types(recipe)
        return decode(self.file(index), recipe.in_chans, recipe.pages, page, recipe.nodata, recipe.max_pixels, types)


@dataclass(frozen=True)
class ImageSet(FileSet, ImageFiles):
    """Image files, in a fixed order.

    Attributes:
        paged: number of the file and of the page of every image, if the pages of a file are images; None if not.
        others: names of images of other formats, which are not read.
    """

    paged: tuple[tuple[int, int], ...] | None = None
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names if self.paged is None else self.paged)

    def name(self, index: int) -> str:
        if self.paged is None:
            return self.names[index]
        file, page = self.paged[index]
        return f"{self.names[file]} page {page + 1}"

    def path(self, index: int) -> str:
        return super().path(index if self.paged is None else self.paged[index][0])

    def file(self, index: int) -> File:
        return self.path(index)

    def describe(self, recipe: Recipe, given: Mapping[str, Any] | None) -> list[str]:
        lines = super().describe(recipe, given)
        if self.others:
            read = ", ".join(ENDINGS["images"])
            lines.append(f"not read: {len(self.others)} images of other formats, such as {self.others[0]}; {read} are")
        return lines

    def read(self, index: int, recipe: Recipe) -> Tensor:
        return self._decoded(index, 0 if self.paged is None else self.paged[index][1], recipe)


def _holds(dtype: str, number: float) -> bool:
    """Return whether a value of a type can be a number."""
    kind = np.dtype(dtype)
    if kind.kind not in "iu" or not math.isfinite(number):  # a recipe refuses infinity by itself
        return kind.kind == "f" or number in (0, 1) or not math.isfinite(number)
    return float(number).is_integer() and np.iinfo(kind).min <= number <= np.iinfo(kind).max


def _kind(header: Header) -> str:
    """Return what an image is, in words."""
    pages = f" x {header.pages} pages" if header.pages > 1 else ""
    channels = header.colours or f"{header.channels} bands"
    return f"{header.dtype} {channels}{pages}"


class WheelPhotographs(ImageSet):
    """The photographs inside the installed scikit-image and scikit-learn."""

    small = True
    place = None

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"epoch_repeats": PHOTOGRAPH_REPEATS} | super().defaults(given)


def with_pages(files: ImageSet, pages: str | None) -> ImageSet:
    """Return the same files, in which every page is an image if `pages` says so. It reads the headers of all."""
    if pages != "images":
        return files
    paged = []
    for number in range(len(files.names)):
        try:
            count = read_header(files.path(number)).pages
        except Exception:  # it is named when it is read
            count = 1
        paged += [(number, page) for page in range(count)]
    return replace(files, paged=tuple(paged))


def wheel_photographs() -> WheelPhotographs:
    """Return the photographs inside the installed scikit-image and scikit-learn. Nothing is downloaded.

    Raises:
        MissingExtra: neither is installed.
    """
    paths = []
    for package, files in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths += [Path(spec.origin).parent / file for file in files.split()]
    present = [path for path in paths if path.is_file()]
    if not present:
        raise MissingExtra("scikit-image and scikit-learn not installed: pip install sparsecnx[train]")
    root = Path(os.path.commonpath([path.parent for path in present]))
    return WheelPhotographs(str(root), tuple(p.relative_to(root).as_posix() for p in present))
