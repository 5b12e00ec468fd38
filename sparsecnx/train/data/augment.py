"""Crops of images in torch alone, so that training needs no torchvision, which fits one torch only.

The functions return bit for bit what torchvision's transforms return, from the same random numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_AREA = 0.2  # part of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10


def resize(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize uint8 `(C, H, W)` to `(C, *size)`, bicubic and antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def random_resized_crop(pixels: Tensor, size: tuple[int, ...], smallest: float = SMALLEST_AREA) -> Tensor:
    """Cut a random box out of uint8 `(C, H, W)` and resize it to `(C, *size)`, as `RandomResizedCrop` of torchvision.

    The box has `smallest` to 1 of the area, and sides of a ratio of 3/4 to 4/3, drawn from torch's default generator.
    """
    height, width = pixels.shape[1:]
    top, left, height, width = _draw_box(height, width, smallest)
    return resize(pixels[:, top : top + height, left : left + width], size)


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


def central_crop(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize uint8 `(C, H, W)` until it just covers `size`, and cut out the centre, `(C, *size)`."""
    sides = pixels.shape[1:]
    scale = max(wanted / side for wanted, side in zip(size, sides, strict=True))
    height, width = (max(wanted, int(side * scale)) for wanted, side in zip(size, sides, strict=True))
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return resize(pixels, (height, width))[:, top : top + size[0], left : left + size[1]]


def random_flip(pixels: Tensor) -> Tensor:
    """Mirror left and right with probability 1/2."""
    return pixels.flip(-1) if torch.rand(1) < 0.5 else pixels
