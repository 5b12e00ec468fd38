"""Image files: which there are, and what was understood of them."""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.train.data.files import ENDINGS, FileSet, find_files
from sparsecnx.train.data.formats import Header, decode, expect_one, read_header
from sparsecnx.train.data.pictures import File, UnsupportedImage
from sparsecnx.train.data.source import Source
from sparsecnx.train.data.statistics import describe_scale, measure
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
    """Images of any channels and depth, which say what they are before they are decoded."""

    @abstractmethod
    def header(self, index: int) -> Header:
        """Return what is known of an image before it is decoded.

        Raises:
            Exception: as `formats.read_header` does.
        """

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        headers = dict(self.headers)
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
                expect_fit(header, recipe)
            except UnsupportedImage as error:
                raise InputError("data", self.root, f"holds {name}, which {error}") from error

    @cached_property
    def headers(self) -> list[tuple[str, Header]]:
        """Return the names and headers of a sample, without files that cannot be read.

        Raises:
            InputError: one is of a kind that cannot be trained on.
        """
        found = []
        for index in self.sample():
            try:
                found.append((self.name(index), self.header(index)))
            except UnsupportedImage as error:
                raise InputError("data", self.root, f"holds {self.name(index)}, which {error}") from error
            except (MissingExtra, InputError):
                raise
            except Exception:  # decoders raise many kinds of errors; a run skips such files and names them
                continue
        return found

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
        headers = dict(self.headers)
        kinds = Counter(_kind(header) for header in headers.values())
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        channels = f"{recipe.in_chans} channel{'s' if recipe.in_chans > 1 else ''}"
        imagenet = ", normalised by the numbers of ImageNet" if recipe.photographs else ""
        lines = [f"files: {len(headers)} looked at, {told}; as {channels}{imagenet}, upright as their EXIF data say"]
        marks = {header.nodata for header in headers.values()} | {recipe.nodata}
        if numbers := sorted(mark for mark in marks if mark is not None):
            lines.append(f"no value: NaN and {', '.join(f'{number:g}' for number in numbers)}")
        small = sum(h.height < recipe.size[0] or h.width < recipe.size[1] for h in headers.values())
        if small and recipe.crop_area is not None:
            lines.append(f"{small} of them are smaller than the crop and are enlarged")
        return [*lines, *describe_scale(recipe, given)]


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
        return decode(self.file(index), recipe.in_chans, recipe.pages, 0, recipe.nodata, recipe.max_pixels)


@dataclass(frozen=True)
class ImageSet(FileSet, ImageFiles):
    """Image files, in a fixed order.

    Attributes:
        paged: number of the file and of the page of every image, if the pages of a file are images; None if not.
    """

    paged: tuple[tuple[int, int], ...] | None = None

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

    def read(self, index: int, recipe: Recipe) -> Tensor:
        page = 0 if self.paged is None else self.paged[index][1]
        return decode(self.path(index), recipe.in_chans, recipe.pages, page, recipe.nodata, recipe.max_pixels)


def expect_fit(header: Header, recipe: Recipe) -> None:
    """Raise UnsupportedImage if an image does not fit a recipe, as far as its header says."""
    expect_one(header, recipe.pages, recipe.max_pixels)
    bands = header.channels * (header.pages if recipe.pages == "channels" else 1)
    colours = "" if bands != header.channels else header.colours
    possible = {1, 2, 3, 4} if header.picture else {bands} | ({1, 3} if colours else set())
    if recipe.in_chans not in possible:
        raise UnsupportedImage(f"has {bands} channels{f' ({colours})' * (colours != '')}: expected {recipe.in_chans}")
    size = (header.height, header.width)
    fits = all(side >= part for side, part in zip(sorted(size), sorted(recipe.size), strict=True))  # lying or not
    if recipe.crop_area is None and not fits:
        problem = f"is {size[0]} x {size[1]}, smaller than the crop of {recipe.pixels}"
        raise UnsupportedImage(f"{problem}; a smaller --image-size takes it in, --crop-area enlarges it")


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


def find_images(folder: str | Path) -> ImageSet:
    """Return all image files below `folder`, see `find_files`.

    Raises:
        InputError: `folder` does not exist, is not a folder, holds no image file, or a folder in it cannot be listed.
    """
    names = find_files(folder)["images"]
    if not names:
        raise InputError("data", folder, f"holds no images; expected files ending in {', '.join(ENDINGS['images'])}")
    return ImageSet(str(Path(folder)), names)


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
