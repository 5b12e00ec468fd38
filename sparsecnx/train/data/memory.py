"""Images in memory: those of Pillow, and arrays. They are read as the same images in files are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sparsecnx.train.data.formats import Header, as_tensor, expect_fit, with_channels
from sparsecnx.train.data.pictures import (
    UnsupportedImage,
    as_picture,
    decode_picture,
    frames,
    is_8_bit,
    orientation,
    upright,
    upright_sides,
)
from sparsecnx.train.data.source import channels_last
from sparsecnx.train.recipe import Recipe

PICTURES = {1: "L", 3: "RGB"}  # what 8 bits of so many channels are


def memory_header(image: Any, in_chans: int | None = None) -> Header:
    """Return what the header of a file of this image would say.

    Args:
        image: an image of Pillow or an array.
        in_chans: see `channels_first`.

    Raises:
        UnsupportedImage: it is of a kind that is not read.
    """
    if isinstance(image, Image.Image):
        size: dict[str, Any] = {**upright_sides(image), "pages": frames(image)}
        if is_8_bit(image):
            return Header("uint8", len(image.getbands()), image.mode, picture=True, **size)
        return Header(str(np.asarray(image).dtype), 1, "L", **size)
    array = channels_first(image, in_chans)
    channels, height, width = array.shape
    if array.dtype == np.uint8 and channels in PICTURES:
        return Header("uint8", channels, PICTURES[channels], height, width, picture=True)
    return Header(str(array.dtype), channels, "", height, width)


def memory_pixels(image: Any, recipe: Recipe, types: Collection[str] | None = None) -> Tensor:
    """Return an image of Pillow or an array as `formats.decode` returns one of a file.

    Args:
        image: an image of Pillow or an array.
        recipe: it says what fits.
        types: of the values that are read; None for all.

    Raises:
        UnsupportedImage: it is of a kind that is not read, or as `expect_fit`.
    """
    header = memory_header(image, recipe.in_chans)
    expect_fit(header, recipe.in_chans, None, recipe.max_pixels, types)
    if not header.picture:
        if isinstance(image, Image.Image):
            array = upright(np.asarray(image)[None], orientation(image))
        else:
            array = channels_first(image, recipe.in_chans)
        return with_channels(as_tensor(array, recipe.nodata), header.colours, recipe.in_chans)
    picture = image if isinstance(image, Image.Image) else as_picture(channels_first(image, recipe.in_chans))
    return as_tensor(decode_picture(picture, recipe.in_chans).numpy(), recipe.nodata)


def channels_first(values: Any, in_chans: int | None) -> np.ndarray[Any, Any]:
    """Return an array `(H, W)`, `(C, H, W)` or `(H, W, C)` as `(C, H, W)`. A tensor of three axes is `(C, H, W)`.

    Args:
        values: the array or tensor.
        in_chans: channels, which tell their axis from the others, see `channels_last`.

    Raises:
        UnsupportedImage: it has another form, or holds no numbers.
    """
    array: np.ndarray[Any, Any] = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or array.size == 0:
        expected = "expected numbers of the form (H, W), (C, H, W) or (H, W, C)"
        raise UnsupportedImage(f"is an array of {array.dtype} {array.shape}: {expected}")
    if array.ndim == 2:
        return array[None]
    if isinstance(values, Tensor):
        return array
    try:
        return array.transpose(2, 0, 1) if channels_last(array.shape[0], array.shape[2], in_chans) else array
    except ValueError as error:
        raise UnsupportedImage(f"is an array {array.shape}, of {error}") from error
