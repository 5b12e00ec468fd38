"""Share what masked autoencoders have in common: masks, patches, and the loss on masked pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.geometry.mask_reading import check_same_device, read_mask
from sparsecnx.geometry.masks import random_mask, visible_count
from sparsecnx.models.convnextv2 import one_if_equal, shape_of
from sparsecnx.models.encoders import Stages, fits
from sparsecnx.tensor import SparseTensor


class MaskedAutoencoder(nn.Module):
    """Mask images, predict the masked patches from the visible ones, and compare. A subclass defines `predict`.

    Args:
        encoder: the network that is trained.
        stages: its feature maps.
        patch_size: pixels per patch side, one number or one for each axis; None is the stride of the encoder.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
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

    def __init__(
        self,
        encoder: nn.Module,
        stages: Stages,
        patch_size: int | Sequence[int] | None,
        norm_pix_loss: bool = True,
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
        self.norm_pix_loss = norm_pix_loss
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

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        visible: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode and reconstruct images.

        Args:
            images: `(B, C, *spatial)`, such as `(B, C, H, W)`, sides multiples of the patch size.
            mask_ratio: fraction of patches removed by a random mask, if `mask` is None; `int(L * (1 - mask_ratio))` of
                L patches stay visible.
            mask: `(B, L)`, `(B, *grid)` or `(B, 1, *grid)`, or a mask of pixels, True or 1 = masked; the same without B
                for all images. See `SparseTensor.from_dense`.
            visible: number of visible patches of `mask`, if it is known and equal in all images, see
                `SparseTensor.from_dense`.
            generator: source of the random mask, on the device of `images` or on the CPU.

        Returns:
            Loss, prediction and mask. The loss is a scalar, see `reconstruction_loss`. The prediction is
            `(B, prod(patch) * C, *grid)`, of images `(B, patch_size**2 * C, gh, gw)`, the pixels of each patch in the
            order (row, column, colour). The mask is bool `(B, L)`, True = masked.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        grid = self.grid(images)
        cells = math.prod(grid)
        if not isinstance(mask_ratio, (int, float)):
            raise TypeError(f"mask_ratio is a {type(mask_ratio).__name__}: expected a number; a mask is given as mask=")
        if mask is None:
            visible = visible_count(cells, mask_ratio, "mask_ratio")
            if visible == cells:
                raise ValueError(f"mask_ratio is {mask_ratio}: it leaves no patch to reconstruct")
            device = images.device if generator is None else generator.device
            mask = random_mask(images.shape[0], grid, mask_ratio, generator=generator, device=device)
            mask = mask.to(images.device)
        check_same_device(mask, images, "images")
        mask = read_mask(mask, tuple(images.shape[2:]), images.shape[0], name="images", grid=grid)
        pred = self.predict(SparseTensor.from_dense(images, mask, visible, below_tile=self.below_tile))
        mask = mask.flatten(1)
        return self._loss(images, pred, mask, grid), pred, mask

    def predict(self, x: SparseTensor) -> Tensor:
        """Return the pixels of all patches, `(B, prod(patch) * C, *grid)`, from the visible ones."""
        raise NotImplementedError

    def reconstruction_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error of the pixels of the masked patches, 0 if none is masked.

        With `norm_pix_loss` the target of a patch is `(t - mean) / sqrt(var + 1e-6)`, var unbiased.
        """
        return self._loss(images, pred, mask, self.grid(images))

    def _loss(self, images: Tensor, pred: Tensor, mask: Tensor, grid: tuple[int, ...]) -> Tensor:
        target = self._patches(images.to(torch.promote_types(images.dtype, torch.float32)), grid)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (pred.flatten(2).mT.to(target.dtype) - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images `(B, C, *spatial)` into patches `(B, L, prod(patch) * C)`, pixels as (row, column, colour)."""
        return self._patches(images, self.grid(images))

    def _patches(self, images: Tensor, grid: tuple[int, ...]) -> Tensor:
        n = len(grid)
        sides = [side for cells, p in zip(grid, self.patch, strict=True) for side in (cells, p)]
        patches = images.reshape(images.shape[0], self.in_chans, *sides)
        order = [*range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1]  # cells, pixels, colour
        return patches.permute(0, *order).reshape(images.shape[0], math.prod(grid), -1)

    def unpatchify(self, patches: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Join patches to images `(B, C, *spatial)`; undoes `patchify`.

        Args:
            patches: `(B, prod(patch) * C, *grid)` as `forward` returns them, or `(B, L, prod(patch) * C)` as `patchify`
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

    def grid(self, images: Tensor) -> tuple[int, ...]:
        """Return the patches per axis of images `(B, C, *spatial)`.

        Raises:
            TypeError, ValueError: `images` is not floating, or a side is not a multiple of patch size and stride.
        """
        expected = shape_of(self.in_chans, self.ndim)
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images is {kind}: expected a floating tensor {expected}")
        if images.ndim != 2 + self.ndim or images.shape[1] != self.in_chans or images.shape[0] == 0:
            raise ValueError(f"images is {tuple(images.shape)}: expected {expected} with B >= 1")
        sides = tuple(map(math.lcm, self.patch, self._stages.strides[-1]))
        if 0 in images.shape or any(size % side for size, side in zip(images.shape[2:], sides, strict=True)):
            name = "patch size" if sides == self.patch else "stride of the encoder"
            raise ValueError(
                f"images is {tuple(images.shape)}: its sides must be multiples of the {name}, {one_if_equal(sides)}"
            )
        return tuple(size // p for size, p in zip(images.shape[2:], self.patch, strict=True))
