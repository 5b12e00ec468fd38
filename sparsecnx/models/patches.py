"""Patches of images, and the errors of patches whose pixels may have no value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOSS_ON = ("masked", "all", "visible")


def patchify(images: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut images `(B, C, *spatial)` into patches `(B, L, prod(patch) * C)`, pixels as (row, column, colour)."""
    n, grid = len(patch), [side // p for side, p in zip(images.shape[2:], patch, strict=True)]
    sides = [side for cells, p in zip(grid, patch, strict=True) for side in (cells, p)]
    patches = images.reshape(*images.shape[:2], *sides)
    order = [*range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1]  # cells, pixels, colour
    return patches.permute(0, *order).reshape(images.shape[0], math.prod(grid), -1)


def squared_errors(pred: Tensor, target: Tensor, valid: Tensor | None, normalise: bool) -> Tensor:
    """Return the mean squared error of each patch over its valid values, `(B, L)`, 0 for a patch without any.

    Args:
        pred: `(B, L, K)`.
        target: likewise, finite where it is not valid.
        valid: bool, likewise; None if every value is valid.
        normalise: whether the target is `(t - mean) / sqrt(var + 1e-6)`, of the valid values of a patch, var unbiased.
    """
    if valid is None:
        if normalise:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (pred - target).square().mean(dim=-1)
    count = valid.sum(dim=-1, keepdim=True)
    some = count.clamp(min=1)
    if normalise:
        mean = target.masked_fill(~valid, 0).sum(dim=-1, keepdim=True) / some
        target = (target - mean).masked_fill(~valid, 0)
        variance = target.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
        target = target / (variance + 1e-6).sqrt()
    return ((pred - target).masked_fill(~valid, 0).square() / some).sum(dim=-1)


def counted_patches(mask: Tensor, loss_on: str, valid: Tensor | None) -> Tensor:
    """Return which patches have a part in the loss, bool `(B, L)`.

    Args:
        mask: bool `(B, L)`, True = masked.
        loss_on: `"masked"`, `"all"` or `"visible"` patches.
        valid: bool `(B, L, K)`; a patch without a valid value does not count.
    """
    counted = {"masked": mask, "visible": ~mask, "all": torch.ones_like(mask)}[loss_on]
    return counted if valid is None else counted & valid.any(dim=-1)


def check_loss_on(loss_on: str) -> None:
    """Raise ValueError unless `loss_on` is one of `LOSS_ON`."""
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on is {loss_on!r}: expected one of {', '.join(LOSS_ON)}")
