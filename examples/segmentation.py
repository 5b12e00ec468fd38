"""Make a small data set to segment: pieces of brick, grass and gravel on photographs, with their label maps.

    python examples/segmentation.py data/materials
    sparsecnx segment --model atto --data data/materials --small-data --image-size 64 --crop-area null --epochs 24

The pixels are real: the photographs and textures in scikit-image, in grey, with brightness and contrast drawn for each
piece, so that neither tells the material. The maps are exact, since the pieces are cut out here: discs, triangles and
rectangles. Training takes the left three fifths of every photograph and texture, the test the right ones, so that no
pixel is in both. See docs/segmentation.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from skimage.color import rgb2gray
from skimage.draw import disk, polygon
from skimage.util import img_as_float

SIDE, PIECES, IMAGES = 128, 4, {"train": 160, "val": 40}
CLASSES = ("other", "brick", "grass", "gravel")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
TRAINING = 0.6  # share of the width of every picture


def part(name: str, split: str) -> np.ndarray:
    """Return the grey part of a picture of scikit-image that a split takes."""
    picture = getattr(data, name)()
    grey = rgb2gray(picture[..., :3]) if picture.ndim == 3 else img_as_float(picture)
    middle = round(TRAINING * grey.shape[1])
    return grey[:, :middle] if split == "train" else grey[:, middle:]


def cut(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a random square of a picture, mirrored or not, of random brightness and contrast."""
    top, left = (random.integers(0, side - SIDE + 1) for side in picture.shape)
    square = picture[top : top + SIDE, left : left + SIDE][:, :: random.choice([-1, 1])]
    normal = (square - square.mean()) / max(square.std(), 1e-3)
    return np.clip(random.uniform(0.35, 0.65) + random.uniform(0.1, 0.2) * normal, 0, 1)


def piece(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of a disc, a triangle or a rectangle."""
    centre, radius = random.uniform(0, SIDE, 2), random.uniform(0.15, 0.35) * SIDE
    corners = random.choice([0, 3, 4])
    if corners == 0:
        return disk(centre, radius, shape=(SIDE, SIDE))
    angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
    rows, columns = centre[:, None] + radius * np.stack([np.sin(angles), np.cos(angles)])
    return polygon(rows, columns, shape=(SIDE, SIDE))


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split, number in IMAGES.items():
        photographs = [part(name, split) for name in PHOTOGRAPHS]
        materials = [part(name, split) for name in CLASSES[1:]]
        for name in ("images", "labels"):
            (folder / split / name).mkdir(parents=True)
        for i in range(number):
            image = cut(photographs[random.integers(len(photographs))], random)
            classes = np.zeros((SIDE, SIDE), np.uint8)
            for _ in range(PIECES):
                material, inside = random.integers(len(materials)), piece(random)
                image[inside] = cut(materials[material], random)[inside]
                classes[inside] = 1 + material
            pixels = np.repeat((255 * image).astype(np.uint8)[..., None], 3, axis=2)
            Image.fromarray(pixels).save(folder / split / "images" / f"{i:03d}.png")
            Image.fromarray(classes).save(folder / split / "labels" / f"{i:03d}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
