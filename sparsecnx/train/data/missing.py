"""Pixels without a value, which are NaN in a batch: out of the input and of the loss."""

from __future__ import annotations

from torch import Tensor


def values_in(images: Tensor) -> Tensor | None:
    """Return bool of the shape of images `(B, C, *size)`, False where a pixel has no value; None where all have one."""
    if not images.is_floating_point() or not (missing := images.isnan()).any():
        return None
    return ~missing
