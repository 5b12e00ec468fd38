"""Crops of images in torch alone, so that training needs no torchvision, which fits one torch only.

On uint8 the functions return bit for bit what torchvision's transforms return, from the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_AREA = 0.2  # part of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10
LEAST_SHARE = 0.5  # of the pixels under a resized one, that have values
# Axes of a crop `(C, *size)` along which it is mirrored, by the number of dimensions: images left and right alone.
MIRRORED = {1: (), 2: (-1,), 3: (-3, -2, -1)}


def resize(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize `(C, H, W)` to `(C, *size)`, bicubic and antialiased.

    Where values are missing, NaN, those around them are weighted by the share of them that is there. A pixel of the
    result is missing where that share is below one half.
    """
    if tuple(pixels.shape[1:]) == size:
        return pixels
    if not pixels.is_floating_point() or not (missing := pixels.isnan()).any():
        return _interpolate(pixels, size)
    share = _interpolate((~missing).to(pixels.dtype), size)
    resized = _interpolate(pixels.masked_fill(missing, 0), size) / share
    return resized.masked_fill(share < LEAST_SHARE, torch.nan)


def _interpolate(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def random_box(
    sides: Sequence[int], size: Sequence[int], smallest: float | None, steps: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Return start and sides of a random box in an image or volume, drawn from torch's default generator.

    Args:
        sides: of the whole.
        size: of the crop.
        smallest: part of the area of an image, `(H, W)`, that the box has at least, as `RandomResizedCrop` of
            torchvision draws it, with sides of a ratio of 3/4 to 4/3; None for a box of `size`, which is not resized.
        steps: the box begins and ends at multiples of them, as the sides do; a resized one at the nearest.
    """
    if smallest is None:
        free = [(side - part) // step + 1 for side, part, step in zip(sides, size, steps, strict=True)]
        return [int(torch.randint(n, (1,))) * step for n, step in zip(free, steps, strict=True)], size
    top, left, height, width = _draw_box(sides[0], sides[1], smallest)
    start, box = [], []
    for first, length, side, step in zip((top, left), (height, width), sides, steps, strict=True):
        begins = min(round(first / step), side // step - 1)
        ends = max(round((first + length) / step), begins + 1)
        start.append(begins * step)
        box.append((ends - begins) * step)
    return start, box


def _draw_box(height: int, width: int, smallest: float) -> tuple[int, int, int, int]:
    """Return top, left, height and width; where no drawn box fits, the largest central one of an allowed ratio."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(ATTEMPTS):
        area = height * width * torch.empty(1).uniform_(smallest, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(low, high)).item()
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(torch.randint(0, height - box_height + 1, (1,)))
            left = int(torch.randint(0, width - box_width + 1, (1,)))
            return top, left, box_height, box_width
    box_height = min(height, round(width / RATIO[0]))
    box_width = min(width, round(height * RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def central_crop(pixels: Tensor, size: tuple[int, ...], share: float = 1.0) -> Tensor:
    """Resize `(C, H, W)` until a share of its sides just covers `size`, and cut out the centre, `(C, *size)`."""
    sides = pixels.shape[1:]
    scale = max(wanted / share / side for wanted, side in zip(size, sides, strict=True))
    height, width = (max(wanted, int(side * scale + 1e-6)) for wanted, side in zip(size, sides, strict=True))
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return resize(pixels, (height, width))[:, top : top + size[0], left : left + size[1]]


def mirrored_axes(dimensions: int) -> list[int]:
    """Draw the axes along which a crop is mirrored, each in `MIRRORED` with probability 1/2."""
    return [axis for axis in MIRRORED[dimensions] if torch.rand(1) < 0.5]
