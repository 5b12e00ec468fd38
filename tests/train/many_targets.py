"""Images with several targets for tests: every target can be computed from the place of a pixel and of the image."""

from io import BytesIO

import numpy as np
from PIL import Image

SIDE = 96
TARGETS = {
    "image": {"type": "image", "channels": 2, "norm_pix_loss": True},
    "radar": {"type": "image", "channels": 3, "weight": 0.5},
    "height": {"type": "image", "channels": 1, "patch_size": 16, "loss_on": "all"},
    "cover": {"type": "class_map", "classes": 7, "ignore_index": 255},
    "weather": {"type": "regression", "values": 2},
    "biome": {"type": "classification", "classes": 4},
}


class Tiles:
    """Eight images of 2 channels, which hold the row and the column of each pixel in hundredths."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        halves = np.mgrid[: SIDE // 2, : SIDE // 2].astype(np.float32)
        item = {
            "image": np.stack([rows, columns]) / 100,
            "radar": np.stack([rows, columns, rows + columns]),
            "height": (halves[:1] + halves[1:] / 100) / 10,
            "cover": ((rows + 2 * columns) % 7).astype(np.uint8),
            "weather": np.array([index, -index], np.float32),
            "biome": np.int64(index % 4),
            "name": f"tile {index}",  # no target, and not read
        }
        if index == 2:
            item |= {"radar": None, "cover": None, "weather": None, "biome": None}
        if index == 5:
            item["image"][:, 10:50] = np.nan
            item["height"][:, 10:20] = np.nan
            item["cover"][5:60] = 255
        return item


def tiles():
    return Tiles()


class Changed(Tiles):
    def __init__(self, **changes):
        self.changes = changes

    def __getitem__(self, index):
        item = super().__getitem__(index) | (self.changes if index in (3, 4) else {})
        return {name: value for name, value in item.items() if value is not ...}


def without_cover():
    return Changed(cover=...)


def flat_radar():
    return Changed(radar=np.zeros((3, SIDE), np.float32))


def odd_cover():
    return Changed(cover=np.zeros((60, 60), np.uint8))


def high_class():
    return Changed(cover=np.full((SIDE, SIDE), 7))


def fine_height():
    return Changed(height=np.zeros((1, SIDE, SIDE), np.float32))


def text_biome():
    return Changed(biome="forest")


def half_class():
    return Changed(biome=1.5)


def flat_cover():
    return Changed(cover=np.zeros(SIDE, np.uint8))


def other_classes():
    return Changed(biome=np.int64(2))


class HalfEmpty(Tiles):
    """Have no value in every second image, but all targets."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["image"] = item["image"] * (np.nan if index % 2 else 1)
        if index % 2:
            item["image"][0, 0, 0] = 1
        return item


def half_empty():
    return HalfEmpty()


class Rare(Tiles):
    """Have a biome in two images alone."""

    def __getitem__(self, index):
        return super().__getitem__(index) | ({} if index in (1, 6) else {"biome": None})


def rare():
    return Rare()


class Coarse(Tiles):
    def __init__(self, side):
        self.coarse = np.zeros((1, side, side), np.float32)

    def __getitem__(self, index):
        return super().__getitem__(index) | {"coarse": self.coarse}


def coarse():
    return Coarse(4)


def coarser():
    return Coarse(3)


def picture(turn):
    """Return an image that EXIF data turn, with other values in each row and column."""
    values = np.add.outer(np.arange(SIDE), 1.5 * np.arange(SIDE)).astype(np.uint8)
    image = Image.fromarray(values)
    image.getexif()[274] = turn
    return image


class Turned(Tiles):
    """Have boxes, which are no target, beside a picture and a map."""

    def __init__(self, image, cover):
        self.image, self.cover = image, cover

    def __getitem__(self, index):
        return {"image": self.image, "cover": self.cover, "boxes": np.zeros((2, 4))}


def turned():
    return Turned(picture(6), picture(6))


def turned_image():
    return Turned(picture(6), picture(1))


def turned_image_beside_array():
    return Turned(picture(3), np.asarray(picture(1)))


def tiff(turn):
    file = BytesIO()
    picture(1).save(file, "TIFF", exif=picture(turn).getexif())
    return Image.open(file)


def turned_tiff():
    return Turned(tiff(3), picture(3))


def turned_tiff_beside_array():
    return Turned(tiff(3), np.asarray(picture(1)))


def turned_cover():
    return Turned(np.asarray(picture(1)), picture(8))
