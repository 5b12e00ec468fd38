"""Pictures of 8 bits, read by Pillow: grey ones, palettes, RGB and CMYK, with transparency or not."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from sparsecnx.common.files import not_regular
from sparsecnx.train.recipe import MAX_PIXELS

File = str | bytes  # the name of a file, or what is in it
ORIENTATION = ExifTags.Base.Orientation
# These turns make an image upright, by the value of its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
        return Image.open(file if isinstance(file, str) else io.BytesIO(file))
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

    Raises:
        UnsupportedImage: a picture has no such number of channels.
    """
    with file:
        if channels not in MODES:
            raise UnsupportedImage(f"is a picture ({file.mode}): expected {channels} channels")
        mode = MODES[channels]
        file.load()  # first, because Pillow turns TIFF upright by itself
        turn = UPRIGHT.get(orientation(file))
        image: Image.Image = file if turn is None else file.transpose(turn)
        image = image if image.mode == mode else image.convert(mode)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def orientation(image: Image.Image) -> Any:
    """Return the value of the EXIF orientation, None where there is none."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raise many kinds of errors, and say nothing about how the image lies
        return None
