"""Share what pretraining on visible patches has in common: the encoder, its patches and its masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.geometry.mask_reading import check_same_device, read_mask
from sparsecnx.geometry.masks import random_mask, visible_count
from sparsecnx.models.convnextv2 import check_patches, one_if_equal
from sparsecnx.models.encoders import Stages, fits
from sparsecnx.models.patches import patchify
from sparsecnx.models.pretrained import Pretrained
from sparsecnx.tensor import SparseTensor


class MaskedEncoder(Pretrained, abstract=True):
    """Mask images for an encoder of the visible patches. A subclass defines what is predicted from them.

    Args:
        encoder: the network that is trained.
        stages: its feature maps.
        patch_size: pixels per patch side, one number or one for each axis; None is the stride of the encoder.
        below_tile: see `SparseTensor.from_dense`.

    Attributes:
        ndim: spatial dimensions, those of the encoder.
        patch: pixels per patch along each axis.
        patch_size, stride: pixels per patch and per site of the last map; a tuple where axes differ.

    Raises:
        ValueError: `patch_size` is no multiple of the stride of the encoder; with `below_tile="dense"` it may also
            divide the stride.
    """

    _remedy = ""  # where patch size and stride do not fit
    _needs_masked = True  # False where the loss counts visible patches, so that none need be masked

    def __init__(
        self,
        encoder: nn.Module,
        stages: Stages,
        patch_size: int | Sequence[int] | None,
        below_tile: str = "raise",
    ) -> None:
        super().__init__()
        stride = stages.strides[-1]
        given = stride if patch_size is None else patch_size
        patch = (given,) * stages.ndim if isinstance(given, int) else tuple(given)
        if len(patch) != stages.ndim or not fits(patch, stride, below_tile):
            raise ValueError(
                f"patch_size is {patch_size}: expected a multiple of {one_if_equal(stride)} pixels on {stages.ndim} "
                f"axes, the stride of the encoder, a {type(encoder).__name__}{self._remedy}"
            )
        self.encoder = encoder
        self.ndim, self.in_chans = stages.ndim, stages.in_chans
        self.patch, self.patch_size = patch, one_if_equal(patch)
        self.below_tile = below_tile
        self.stride = one_if_equal(stride)
        self._stages = stages

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep little of the encoder for backward, which computes it again: less memory, more time.

        Raises:
            TypeError: the encoder has no such method.
        """
        method: Any = getattr(self.encoder, "set_grad_checkpointing", None)
        if method is None:
            raise TypeError(f"encoder is a {type(self.encoder).__name__}: it has no set_grad_checkpointing")
        method(enable)

    def mask_images(
        self,
        images: Tensor,
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        visible: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[SparseTensor, Tensor]:
        """Return the visible pixels of images, and the mask, bool `(B, L)`, True = masked.

        Args:
            images, mask_ratio, mask, valid, visible, generator: see `MaskedAutoencoder.forward`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        grid = self.grid(images)
        cells = math.prod(grid)
        if not isinstance(mask_ratio, (int, float)):
            raise TypeError(f"mask_ratio is a {type(mask_ratio).__name__}: expected a number; a mask is given as mask=")
        if mask is None:
            if visible is not None:
                raise ValueError(f"visible is {visible}: expected None without mask; mask_ratio says how many stay")
            visible = visible_count(cells, mask_ratio, "mask_ratio")
            if visible == cells and self._needs_masked:
                raise ValueError(f"mask_ratio is {mask_ratio}: it leaves no patch to reconstruct")
            device = images.device if generator is None else generator.device
            mask = random_mask(images.shape[0], grid, mask_ratio, generator=generator, device=device)
            mask = mask.to(images.device)
        check_same_device(mask, images, "images")
        mask = read_mask(mask, tuple(images.shape[2:]), images.shape[0], name="images", grid=grid)
        images = without_invalid(images, valid)
        # The axis of 1 says that the others are the grid, for a batch of one image too.
        x = SparseTensor.from_dense(images, mask[:, None], visible, below_tile=self.below_tile)
        return x, mask.flatten(1)

    def grid(self, images: Tensor) -> tuple[int, ...]:
        """Return the patches per axis of images `(B, C, *spatial)`.

        Raises:
            TypeError, ValueError: `images` is not floating, or a side is not a multiple of patch size and stride.
        """
        sides = tuple(map(math.lcm, self.patch, self._stages.strides[-1]))
        called = "the patch size" if sides == self.patch else "the stride of the encoder"
        check_patches(images, self.in_chans, sides, called)
        return tuple(size // p for size, p in zip(images.shape[2:], self.patch, strict=True))

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images `(B, C, *spatial)` into patches `(B, L, prod(patch) * C)`, pixels as (row, column, colour)."""
        self.grid(images)
        return patchify(images, self.patch)

    def unpatchify(self, patches: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Join patches to images `(B, C, *spatial)`; undoes `patchify`.

        Args:
            patches: `(B, prod(patch) * C, *grid)` as a model predicts them, or `(B, L, prod(patch) * C)` as `patchify`
                does.
            grid: patches per axis, `(gh, gw)` of images; needed for `(B, L, prod(patch) * C)` only.

        Raises:
            ValueError: `patches` has another shape, or L is not the number of cells of `grid`.
        """
        n, values = self.ndim, math.prod(self.patch) * self.in_chans
        if patches.ndim == 2 + n and patches.shape[1] == values and grid in (None, tuple(patches.shape[2:])):
            grid = tuple(patches.shape[2:])
            patches = patches.flatten(2).mT
        if grid is None or patches.ndim != 3 or patches.shape[1:] != (math.prod(grid), values):
            cells = "L" if grid is None else math.prod(grid)
            axes = ", ".join(("gd", "gh", "gw")[3 - n :])
            expected = f"expected (B, {values}, {axes}), or (B, {cells}, {values}) with grid=({axes})"
            raise ValueError(f"patches is {tuple(patches.shape)} and grid is {grid}: {expected}")
        images = patches.reshape(patches.shape[0], *grid, *self.patch, self.in_chans)
        order = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]  # cell and pixel of each axis in turn
        sides = [cells * p for cells, p in zip(grid, self.patch, strict=True)]
        return images.permute(0, 1 + 2 * n, *order).reshape(-1, self.in_chans, *sides)


def without_invalid(images: Tensor, valid: Tensor | None) -> Tensor:
    """Return images whose pixels are 0 where `valid` is False.

    Args:
        images: `(B, C, *spatial)`.
        valid: bool of that shape, or `(B, 1, *spatial)` for all channels; None leaves the images as they are.

    Raises:
        TypeError, ValueError: `valid` is not bool, of another shape or on another device.
    """
    if valid is None:
        return images
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        kind = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid is {kind}: expected a bool tensor, True where a pixel has a value")
    shapes = [(images.shape[0], channels, *images.shape[2:]) for channels in (images.shape[1], 1)]
    if tuple(valid.shape) not in shapes:
        raise ValueError(f"valid is {tuple(valid.shape)}: expected {shapes[0]} as images, or {shapes[1]}")
    if valid.device != images.device:
        raise ValueError(f"valid is on {valid.device}, images on {images.device}: pass valid.to(images.device)")
    return images.masked_fill(~valid, 0)
