"""Masks: random ones as in MAE (arXiv 2111.06377) and FCMAE (arXiv 2301.00808, section 3.1), and their checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecnx.common.memory import check_memory


def visible_count(cells: int, ratio: float, name: str = "ratio") -> int:
    """Return the tiles kept of `cells` at a mask ratio: `int(cells * (1 - ratio))`, 19 of 49 at 0.6.

    Args:
        name: what errors call the ratio.

    Raises:
        ValueError: `ratio` is outside [0, 1), or no tile would be left.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} is {ratio}: expected 0 <= {name} < 1, the fraction of patches removed")
    kept = int(cells * (1 - ratio))
    if kept == 0:
        raise ValueError(f"{name} is {ratio}: it leaves none of the {cells} patches visible")
    return kept


def random_mask(
    batch: int,
    grid: tuple[int, ...],
    ratio: float = 0.6,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a mask that removes the same number of patches from every image.

    Args:
        batch: number of images.
        grid: patches per axis, `(gh, gw)` for images.
        ratio: fraction removed; `int(L * (1 - ratio))` of `L = prod(grid)` patches stay visible.
        generator: source of randomness, on `device`.
        device: where the mask is made; the generator's device by default.

    Returns:
        bool `(batch, L)`, True = masked, L in raster order.

    Raises:
        TypeError: `grid` is no tuple.
        ValueError: `batch` or `grid` is empty, `ratio` outside [0, 1) or leaves nothing visible.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: expected at least one image")
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid is {grid!r}: expected the patches per axis, such as (7, 7)")
    if not grid or min(grid) < 1:
        raise ValueError(f"grid is {tuple(grid)}: expected a positive number of patches per axis")
    cells = math.prod(grid)
    kept = visible_count(cells, ratio)
    if device is None and generator is not None:
        device = generator.device
    if generator is None:  # torch.compile takes no such argument, not even None, where sizes vary.
        noise = torch.rand(batch, cells, device=device)
    else:
        noise = torch.rand(batch, cells, generator=generator, device=device)
    order = noise.argsort(dim=1)
    mask = torch.ones(batch, cells, dtype=torch.bool, device=device)
    return mask.scatter(1, order[:, :kept], False)


def check_mask(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the mask as `(B, prod(grid))`.

    Raises:
        TypeError: not a bool tensor.
        ValueError: the shape does not fit `grid`.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{describe(mask)}: expected a bool tensor (B, {math.prod(grid)}), True = masked")
    check_memory(mask=mask)
    shape = tuple(mask.shape)
    if mask.ndim == 0 or shape[1:] not in ((math.prod(grid),), tuple(grid)):
        batch, name = shape[0] if shape else "B", format_shape(grid)
        raise ValueError(f"mask is {shape}: a {name} grid needs {(batch, math.prod(grid))} or {(batch, *grid)}")
    return mask.flatten(1) if mask.ndim > 2 else mask.reshape(shape[0], math.prod(grid))


def describe(mask: object) -> str:
    """Return what a mask is, for an error."""
    if isinstance(mask, Tensor):
        return f"mask is {mask.dtype} {tuple(mask.shape)}"
    return f"mask is a {type(mask).__name__}"


def format_shape(shape: tuple[int, ...]) -> str:
    """Write a shape as "7x7". Call it only where an error is raised: torch.compile cannot make text of open sizes."""
    return "x".join(map(str, shape))
