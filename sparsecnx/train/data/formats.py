"""Image files of any depth and number of bands: what the header says, and the values as they are.

| read by | what |
|---|---|
| Pillow | pictures of 8 bits, but TIFF of plain grey or RGB |
| tifffile | other TIFF: any type, bands interleaved or planar, pages, BigTIFF, GeoTIFF |
| rasterio, where it is installed | what tifffile refuses |
| imagecodecs | PNG of 16 bits |
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import MissingExtra
from sparsecnx.common.files import not_regular
from sparsecnx.train.data.pictures import (
    LYING,
    MODES,
    ORIENTATION,
    File,
    UnsupportedImage,
    as_picture,
    decode_picture,
    expect_size,
    frames,
    is_8_bit,
    open_picture,
    orientation,
    upright,
    upright_sides,
)
from sparsecnx.train.data.scale import as_floats

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
# Samples of a pixel, by the photometric interpretation of TIFF: grey, RGB, palette, CMYK and YCbCr.
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
GDAL_NODATA = 42113
WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601), as Pillow takes them


@dataclass(frozen=True)
class Header:
    """The header of an image file, without its values.

    Attributes:
        dtype: of the values, such as uint16.
        channels: of a page.
        colours: L, LA, RGB or RGBA, where the channels are these, and Pillow's mode of a picture; "" for bands.
        height, width: of the upright image.
        pages: of the file.
        nodata: value of pixels that have none.
        picture: True for grey, palettes and colours of 8 bits, which become one another.
    """

    dtype: str
    channels: int
    colours: str
    height: int
    width: int
    pages: int = 1
    nodata: float | None = None
    picture: bool = False

    def channels_as(self, pages: str | None) -> int:
        """Return the channels of an image if none are wished: of pictures 3, without transparency."""
        if pages == "channels" and self.pages > 1:
            return self.channels * self.pages
        return 3 if self.picture else len(self.colours.removesuffix("A")) or self.channels


def read_header(file: File) -> Header:
    """Return what the header of a file says.

    Raises:
        UnsupportedImage: it is no regular file, or of a kind that is not read.
        MissingExtra: a library that reads it is not installed.
        Exception: whatever the decoder raises.
    """
    if _is_tiff(file):
        with _open_tiff(file) as tiff:
            return _tiff_header(tiff)
    with open_picture(file) as image:
        return _picture_header(image)


def _picture_header(image: Any) -> Header:
    """Return the header of an image that Pillow has opened."""
    found: dict[str, Any] = {**upright_sides(image), "pages": frames(image)}
    if is_8_bit(image):
        return Header("uint8", len(image.getbands()), image.mode, picture=True, **found)
    if image.format != "PNG":
        problem = f"has channels of more than 8 bits, or signed ones (Pillow's mode {image.mode})"
        raise UnsupportedImage(f"{problem}: expected 8-bit ones in {image.format}; TIFF, PNG and .npy take others")
    colours = str(image.tile[0][3]).partition(";")[0].replace("I", "L")
    return Header("uint16", len(colours), colours, **found)


def decode(
    file: File,
    channels: int,
    pages: str | None = None,
    page: int = 0,
    nodata: float | None = None,
    max_pixels: int | None = None,
    types: Collection[str] | None = None,
) -> Tensor:
    """Return an image, upright, `(channels, H, W)`: uint8 as it is, every other type as float32, NaN without a value.

    Args:
        file: its name, or what is in it.
        channels: grey, RGB and transparency become one another; bands are as they are.
        pages: what several pages are, see `Recipe.pages`.
        page: the page that is read, if they are images.
        nodata: value of pixels that have none, beside what a GeoTIFF says.
        max_pixels: size of the largest image.
        types: of the values that are read; None for all.

    Raises:
        UnsupportedImage, MissingExtra, Exception: as `read_header` does; or, before it is decoded, as `expect_fit`.
    """
    if _is_tiff(file):
        with _open_tiff(file) as tiff:
            header, every = _tiff_header(tiff), _pages(tiff)
            expect_fit(header, channels, pages, max_pixels, types)
            if header.picture and _is_for_pillow(every[0]):
                image = open_picture(file)
                image.seek(every[0].index)
                return as_tensor(decode_picture(image, channels).numpy(), nodata)
            kept = [page] if pages == "images" else range(header.pages)
            array = np.concatenate([_page_values(file, tiff, number) for number in kept])
            array = upright(array, _tag(every[kept[0]], ORIENTATION))
        if header.picture:
            return as_tensor(decode_picture(as_picture(array), channels).numpy(), nodata)
        colours = header.colours if len(kept) == 1 else ""
        return with_channels(as_tensor(array, header.nodata, nodata), colours, channels)
    with open_picture(file) as image:
        header = _picture_header(image)
        expect_fit(header, channels, None, max_pixels, types)
        if header.picture:
            return as_tensor(decode_picture(image, channels).numpy(), nodata)
        turn = orientation(image)
    array = library("imagecodecs", file, "train").png_decode(_contents(file))
    array = array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)
    colours = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(array)]  # a transparent colour makes one more than the header
    return with_channels(as_tensor(upright(array, turn), nodata), colours, channels)


def _is_tiff(file: File) -> bool:
    if isinstance(file, str) and os.path.exists(file) and (problem := not_regular(file)) is not None:
        raise UnsupportedImage(f"is {problem}")
    return _contents(file, 4) in TIFF


def _contents(file: File, most: int = -1) -> bytes:
    """Return what is in a file, or its first bytes."""
    if isinstance(file, bytes):
        return file if most < 0 else file[:most]
    with open(file, "rb") as opened:
        return opened.read(most)


def expect_one(header: Header, pages: str | None, max_pixels: int | None) -> None:
    """Raise UnsupportedImage if an image is too large, or one of several in its file without a word about them."""
    if max_pixels is not None:
        expect_size(header.width, header.height, max_pixels)
    if header.pages > 1 and pages is None:
        remedy = "; --pages channels or --pages images says what those of a TIFF in a folder are"
        raise UnsupportedImage(f"has {header.pages} pages or frames: expected one image in a file{remedy}")


def expect_fit(
    header: Header, channels: int, pages: str | None, max_pixels: int | None, types: Collection[str] | None
) -> None:
    """Raise UnsupportedImage if an image is not what a run reads, as far as its header says.

    Args:
        header: of the image.
        channels, pages, max_pixels, types: as in `decode`.
    """
    expect_one(header, pages, max_pixels)
    if header.picture and channels not in MODES:
        raise UnsupportedImage(f"is a picture ({header.colours}): expected {channels} channels")
    bands = header.channels * (header.pages if pages == "channels" else 1)
    colours = header.colours if bands == header.channels else ""
    if not header.picture and channels not in {bands} | ({1, 3} if colours else set()):
        told = f" ({colours})" if colours else ""
        problem = f"has {bands} channels{told}: expected {channels}, as --in-chans or the others say"
        raise UnsupportedImage(problem)
    if types is not None and header.dtype not in types:
        expected = f"expected {' or '.join(sorted(types))}"
        remedy = "--normalize dataset with --value-range takes several types"
        raise UnsupportedImage(f"holds values of type {header.dtype}: {expected}; {remedy}")


def library(name: str, file: File, extra: str) -> Any:
    """Return a library.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        named = os.path.basename(file) if isinstance(file, str) else "the image"
        problem = f"{named} needs {name}, which is not installed"
        raise MissingExtra(f"{problem}: pip install sparsecnx[{extra}]") from error


def _open_tiff(file: File) -> Any:
    return library("tifffile", file, "train").TiffFile(file if isinstance(file, str) else io.BytesIO(file))


def _pages(tiff: Any) -> list[Any]:
    """Return the pages that are images, and no smaller copies or masks of others."""
    return [page for page in tiff.pages if not page.is_reduced and not page.is_mask]


def _tag(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _tiff_header(tiff: Any) -> Header:
    """Return the header of a TIFF, whose pages must be alike."""
    pages = _pages(tiff)
    if any(page.is_mask for page in tiff.pages):
        raise UnsupportedImage("holds a mask of its pixels: expected NaN or a nodata value where there is none")
    if (tiff.is_imagej or tiff.is_shaped) and sum(math.prod(s.shape) for s in tiff.series) > sum(p.size for p in pages):
        raise UnsupportedImage("is a stack with a header for its first page alone: expected one for each page")
    first = pages[0]
    for page in pages:
        if page.dtype is None or page.dtype.kind not in "biuf":
            raise UnsupportedImage(f"holds values of {page.bitspersample} bits of type {page.dtype}: expected numbers")
        if page.bitspersample < 8 and page.axes == "YXS":  # which tifffile 2026.3 does not unpack right
            raise UnsupportedImage(
                f"has {page.bitspersample} bits in a band, interleaved: expected 8 or more, or planes"
            )
        if page.axes not in ("YX", "YXS", "SYX"):
            raise UnsupportedImage(f"has the axes {page.axes}: expected height, width and samples")
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            both = f"{first.shape} {first.dtype} and {page.shape} {page.dtype}"
            raise UnsupportedImage(f"has pages of different kinds, {both}: expected the same in all")
    samples, colours = first.samplesperpixel, COLOURS.get(first.photometric, 0)
    alpha = samples == colours + 1 and tuple(first.extrasamples)[:1] in ((1,), (2,))
    plain = colours > 0 and (samples == colours or alpha)
    nodata = _nodata(_tag(first, GDAL_NODATA))
    eight = str(first.dtype) in ("uint8", "bool") and first.bitspersample <= 8
    picture = eight and plain and len(pages) == 1 and nodata is None
    other = not picture and first.photometric in (0, 3, 5, 8, 32845)
    if other or (first.photometric == 6 and first.compression == 1):
        kind = f"{first.photometric.name} in {first.bitspersample} bits" + (f", {len(pages)} pages" * (len(pages) > 1))
        raise UnsupportedImage(f"has colours of the kind {kind}: expected grey, RGB or bands")
    name = ("RGB" if colours == 3 else "L") + "A" * alpha if plain else ""
    height, width = first.shape[-2:] if first.axes == "SYX" else first.shape[:2]
    if _tag(first, ORIENTATION) in LYING:
        height, width = width, height
    dtype = "uint8" if picture else str(first.dtype)
    return Header(dtype, samples, name, height, width, len(pages), nodata, picture)


def _is_for_pillow(page: Any) -> bool:
    """Return whether a page of 8 bits needs more than unpacking, such as the colours of its palette.

    These are inverted grey, palettes, CMYK, YCbCr, less than 8 bits, and colours multiplied by their transparency.
    """
    return page.photometric in (0, 3, 5, 6) or page.bitspersample < 8 or tuple(page.extrasamples)[:1] == (1,)


def _nodata(text: Any) -> float | None:
    """Return the number of GDAL's tag."""
    if text is None:
        return None
    try:
        number = float(str(text).strip(" \0"))
    except ValueError as error:
        raise UnsupportedImage(f"says that {text!r} stands for no data: expected a number") from error
    return None if math.isnan(number) else number


def _page_values(file: File, tiff: Any, number: int) -> np.ndarray[Any, Any]:
    """Return a page as `(C, H, W)`."""
    page = _pages(tiff)[number]
    try:
        values = np.asarray(page.asarray())
    except Exception as error:  # a codec that is missing or unknown raises errors of many kinds
        return _by_rasterio(file, page.index, error)
    if page.axes == "YX":
        return values[None]
    return values if page.axes == "SYX" else values.transpose(2, 0, 1)


def _by_rasterio(file: File, page: int, error: Exception) -> np.ndarray[Any, Any]:
    """Return a page as `(C, H, W)`, or raise the error of tifffile if rasterio is not installed or fails too."""
    try:
        rasterio = importlib.import_module("rasterio")
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # of images without a place on Earth
            path = file if isinstance(file, str) else stack.enter_context(rasterio.MemoryFile(file)).name
            values: np.ndarray[Any, Any] = stack.enter_context(rasterio.open(f"GTIFF_DIR:{page + 1}:{path}")).read()
    except Exception:
        raise error from None
    return values


def as_tensor(values: np.ndarray[Any, Any], *nodata: float | None) -> Tensor:
    """Return uint8 as it is and other types as float32, NaN where the value is one of `nodata`."""
    if values.dtype == np.uint8 and all(number is None for number in nodata):
        return torch.from_numpy(np.ascontiguousarray(values))
    return torch.from_numpy(as_floats(values, *nodata))


def with_channels(values: Tensor, colours: str, channels: int) -> Tensor:
    """Return `(channels, H, W)`: transparency dropped, grey as equal colours, colours as grey; bands as they are.

    Raises:
        UnsupportedImage: it has other channels.
    """
    if len(values) == channels:
        return values
    if colours.endswith("A") and channels in (1, 3):
        values, colours = values[:-1], colours[:-1]
    if colours == "L" and channels == 3:
        return values.expand(3, -1, -1)
    if colours == "RGB" and channels == 1:
        weights = torch.tensor(WEIGHTS).view(3, 1, 1)
        return (values * weights).sum(0, keepdim=True)
    if len(values) != channels:
        raise UnsupportedImage(f"has {len(values)} channels: expected {channels}, as --in-chans or the others say")
    return values
