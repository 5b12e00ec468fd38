"""Pictures of 8 bits, read by Pillow: grey ones, palettes, RGB and CMYK, with transparency or not."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from sparsecnx.common.files import not_regular
from sparsecnx.train.recipe import MAX_PIXELS

File = str | bytes  # the name of a file, or what is in it
ORIENTATION = 274  # the tag of EXIF and TIFF
UPRIGHT = 1  # its value where nothing is turned
LYING = (5, 6, 7, 8)  # values of the orientation of an image whose width is its height when it is upright
# Pillow reads more, and runs other programs for some of it, such as Ghostscript for PostScript named a.jpg.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP", "TIFF", "GIF")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by the channels of the recipe


class UnsupportedImage(ValueError):
    """A whole image of a kind that the command does not read; the message says why."""


def open_picture(file: File) -> ImageFile.ImageFile:
    """Open an image file and read its header, but not its pixels.

    Raises:
        UnsupportedImage: it is no regular file.
        Exception: whatever the decoder raises.
    """
    if isinstance(file, str) and os.path.exists(file) and (problem := not_regular(file)) is not None:
        raise UnsupportedImage(f"is {problem}")
    # Pillow has a limit of its own, from 89 million pixels on. It warns of some images and refuses others.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file if isinstance(file, str) else io.BytesIO(file), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def frames(image: Image.Image) -> int:
    """Return the pages or frames of an open image. Photographs of many phones have a preview or depth map behind."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def expect_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise UnsupportedImage if an image is larger than a run reads."""
    if width * height > max_pixels:
        problem = f"has {width} x {height} pixels, more than --max-pixels, {max_pixels}; a larger one lets it in"
        raise UnsupportedImage(problem)


def is_8_bit(image: Image.Image) -> bool:
    """Return whether 8 bits hold the values in a file, no TIFF. Of 16-bit colours Pillow keeps 8 bits in silence."""
    if image.mode[0] in "IF":
        return False
    for tile in getattr(image, "tile", ()):  # the arguments of its decoder: the raw mode, and for PPM the largest value
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(argument, str) and ";16" in argument for argument in arguments):
            return False
        if image.format == "PPM" and any(isinstance(argument, int) and argument > 255 for argument in arguments):
            return False
    return True


def decode_picture(file: Image.Image, channels: int) -> Tensor:
    """Return an open image as uint8 `(channels, H, W)`, upright as its EXIF orientation says, and close it.

    Args:
        file: the image.
        channels: 1 to 4, see `MODES`.
    """
    mode = MODES[channels]
    with file:
        file.load()  # first, because Pillow turns TIFF upright by itself
        turn = orientation(file)
        image = file if file.mode == mode else file.convert(mode)
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, channels)
        return torch.from_numpy(upright(pixels.transpose(2, 0, 1), turn).copy())


def as_picture(values: np.ndarray[Any, Any]) -> Image.Image:
    """Return uint8 `(C, H, W)` of 1 to 4 channels as an image of Pillow."""
    return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))


def upright(values: np.ndarray[Any, Any], orientation: Any) -> np.ndarray[Any, Any]:
    """Turn `(C, H, W)` upright, by the value of its EXIF orientation."""
    if orientation in LYING:
        values = values.swapaxes(1, 2)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return values[:, :: -1 if down else 1, :: -1 if across else 1]


def upright_sides(image: Image.Image) -> dict[str, int]:
    """Return height and width of an open image when it is upright, without its pixels."""
    try:
        lies = Image.Image.getexif(image).get(ORIENTATION) in LYING  # PNG's own method decodes the image
    except Exception:  # see `orientation`
        lies = False
    height, width = (image.width, image.height) if lies else (image.height, image.width)
    return {"height": height, "width": width}


def orientation(image: Image.Image) -> int:
    """Return the value of the EXIF orientation, 1 where there is none."""
    found: Any = None
    with suppress(Exception):  # damaged EXIF data raise many kinds of errors, and say nothing about how the image lies
        found = image.getexif().get(ORIENTATION)
    return found if found in range(1, 9) else UPRIGHT
