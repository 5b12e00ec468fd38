"""Image files: which there are, and how one is read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.common.files import not_regular
from sparsecnx.train.data.files import ENDINGS, FileSet, find_files
from sparsecnx.train.recipe import MAX_PIXELS, Recipe

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
# These turns make an image upright, by the value of its EXIF orientation.
ORIENTATION = ExifTags.Base.Orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsupportedImage(ValueError):
    """A whole image of a kind that the command does not read; the message says why."""


class ImageSet(FileSet):
    """Image files, in a fixed order."""

    def read(self, index: int, recipe: Recipe) -> Tensor:
        return read_image(self.path(index), recipe.max_pixels)

    def check(self, recipe: Recipe) -> None:
        """Look at the headers of a sample. Files that are damaged or no images are not refused here."""
        for index in self.sample():
            try:
                open_image(self.path(index), recipe.max_pixels).close()
            except UnsupportedImage as error:
                raise InputError("data", self.root, f"holds {self.names[index]}, which {error}") from error
            except Exception:  # decoders raise many kinds of errors
                continue


class WheelPhotographs(ImageSet):
    """The photographs inside the installed scikit-image and scikit-learn."""

    small = True
    place = None

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"epoch_repeats": PHOTOGRAPH_REPEATS}


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


def open_image(path: str, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open an image file and read its header, but not its pixels.

    Raises:
        UnsupportedImage: it is no regular file, has more than `max_pixels` pixels, several pages, or other channels
            than 8-bit ones. These would be cut or clipped.
        Exception: whatever the decoder raises.
    """
    if os.path.exists(path) and (problem := not_regular(path)) is not None:
        raise UnsupportedImage(f"is {problem}")
    # Pillow has a limit of its own, from 89 million pixels on. It warns of some images and refuses others.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if (problem := _unsupported(image, max_pixels)) is not None:
        image.close()
        raise UnsupportedImage(problem)
    return image


def _unsupported(image: ImageFile.ImageFile, max_pixels: int) -> str | None:
    """Return why an open image would not be read as it is, or None."""
    width, height = image.size
    if width * height > max_pixels:
        return f"has {width} x {height} pixels, more than --max-pixels, {max_pixels}; a larger one lets it in"
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":  # photographs of many phones, with a preview or a depth map behind
        return f"has {pages} pages or frames: expected one image in a file"
    if _is_8_bit(image):
        return None
    return f"has channels of more than 8 bits, or signed ones (Pillow's mode {image.mode}): expected 8-bit ones"


def _is_8_bit(image: ImageFile.ImageFile) -> bool:
    """Return whether 8 bits hold the values in the file. Of 16-bit colours Pillow keeps 8 bits, and does not tell."""
    if image.mode[0] in "IF":
        return False
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        bits, formats = (tags.get(tag, ()) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
        return all(bit <= 8 for bit in bits) and all(kind == 1 for kind in formats)
    for tile in image.tile:  # the arguments of its decoder: the raw mode, and for PPM the largest value
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(argument, str) and ";16" in argument for argument in arguments):
            return False
        if image.format == "PPM" and any(isinstance(argument, int) and argument > 255 for argument in arguments):
            return False
    return True


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a file to RGB, uint8 `(3, H, W)`, upright as its EXIF orientation says. Raises as `open_image` does."""
    with open_image(path, max_pixels) as file:
        file.load()  # first, because Pillow turns TIFF upright by itself
        turn = UPRIGHT.get(_orientation(file))
        image: Image.Image = file if turn is None else file.transpose(turn)
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raise many kinds of errors, and say nothing about how the image lies
        return None
