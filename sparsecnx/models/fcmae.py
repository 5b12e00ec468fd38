"""The fully convolutional masked autoencoder, FCMAE (arXiv 2301.00808, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.masks import check_same_images, random_mask, visible_count
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.models.convnextv2 import (
    STRIDE,
    ConvNeXtV2Encoder,
    Layers,
    check_images,
    init_weights,
)
from sparsecnx.nn import Conv2d, ConvNeXtV2Block
from sparsecnx.tensor import SparseTensor


class FCMAE(nn.Module):
    """A sparse ConvNeXt V2 encoder on the visible patches, a light decoder on all, and the loss on the masked ones.

    Args:
        encoder: the masked encoder; on a SparseTensor of the visible pixels it returns one at stride 32.
        patch_size: pixels per patch side, a multiple of 32.
        decoder_depth: blocks of the decoder.
        decoder_dim: channels of the decoder.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
    """

    def __init__(
        self,
        encoder: ConvNeXtV2Encoder,
        patch_size: int = 32,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        if patch_size < STRIDE or patch_size % STRIDE:
            raise ValueError(f"patch_size is {patch_size}: expected a multiple of {STRIDE} pixels")
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        self.encoder = encoder
        self.in_chans = encoder.in_chans
        self.proj = Conv2d(encoder.dims[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = Layers(*(ConvNeXtV2Block(decoder_dim) for _ in range(decoder_depth)))
        # The kernel is 1x1 for the published 32-pixel patch. A larger patch is predicted from all its sites.
        sites = patch_size // STRIDE
        self.pred = Conv2d(decoder_dim, patch_size**2 * self.in_chans, sites, stride=sites)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for backward, see `ConvNeXtV2Encoder.set_grad_checkpointing`."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

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
            images: `(B, C, H, W)`, H and W multiples of the patch size.
            mask_ratio: fraction of patches removed by a random mask, if `mask` is None.
            mask: bool `(B, L)` or `(B, gh, gw)`, True = masked.
            visible: number of visible patches of `mask`, if it is known and equal in all images, see
                `SparseTensor.from_dense`.
            generator: source of the random mask, on the device of `images` or on the CPU.

        Returns:
            Loss, prediction and mask. The loss is a scalar, see `reconstruction_loss`. The prediction is
            `(B, patch_size**2 * C, gh, gw)`, the pixels of each patch in the order (row, column, colour). The mask is
            bool `(B, L)`, True = masked.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        grid = self.grid(images)
        if not isinstance(mask_ratio, (int, float)):
            raise TypeError(f"mask_ratio is a {type(mask_ratio).__name__}: expected a number; a mask is given as mask=")
        if mask is None:
            visible = visible_count(grid[0] * grid[1], mask_ratio, "mask_ratio")
            if visible == grid[0] * grid[1]:
                raise ValueError(f"mask_ratio is {mask_ratio}: it leaves no patch to reconstruct")
            device = images.device if generator is None else generator.device
            mask = random_mask(images.shape[0], grid, mask_ratio, generator=generator, device=device)
            mask = mask.to(images.device)
        check_same_images(mask, images, "images")
        layout = Layout(TileSet.from_mask(mask, grid, visible), self.patch_size)
        mask = mask.reshape(-1, grid[0] * grid[1])
        pred = self.forward_decoder(self.encoder(SparseTensor(gather_rows(images, layout), layout)))
        return self._loss(images, pred, mask, grid), pred, mask

    def forward_decoder(self, encoded: SparseTensor) -> Tensor:
        """Return predictions `(B, patch_size**2 * C, gh, gw)` for the SparseTensor of the last stage."""
        x = self.proj(encoded).dense(fill=self.mask_token.flatten())
        # The decoder sees every site. Its blocks run on a SparseTensor without a mask: the fused operator is
        # faster than the dense sequence and keeps less for backward.
        layout = Layout(TileSet.all_visible(x.shape[0], encoded.layout.shape, x.device), 1, encoded.layout.stride)
        x = SparseTensor(gather_rows(x, layout), layout)
        return self.pred(self.decoder(x).dense())

    def reconstruction_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error of the pixels of the masked patches, 0 if none is masked.

        With `norm_pix_loss` the target of a patch is `(t - mean) / sqrt(var + 1e-6)`, var unbiased.
        """
        return self._loss(images, pred, mask, self.grid(images))

    def _loss(self, images: Tensor, pred: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        target = self._patches(images.to(torch.promote_types(images.dtype, torch.float32)), grid)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (pred.flatten(2).mT.to(target.dtype) - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images `(B, C, H, W)` into patches `(B, L, patch_size**2 * C)`, pixels as (row, column, colour)."""
        return self._patches(images, self.grid(images))

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        (gh, gw), p = grid, self.patch_size
        patches = images.reshape(images.shape[0], self.in_chans, gh, p, gw, p)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], gh * gw, -1)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Join patches to images `(B, C, H, W)`; undoes `patchify`.

        Args:
            patches: `(B, patch_size**2 * C, gh, gw)` as `forward` returns them, or `(B, L, patch_size**2 * C)` as
                `patchify` does.
            grid: `(gh, gw)`, needed for three dimensions only.

        Raises:
            ValueError: `patches` has another shape, or L is not the number of cells of `grid`.
        """
        p, values = self.patch_size, self.patch_size**2 * self.in_chans
        if patches.ndim == 4 and patches.shape[1] == values and grid in (None, tuple(patches.shape[2:])):
            grid = patches.shape[2], patches.shape[3]
            patches = patches.flatten(2).mT
        if grid is None or patches.ndim != 3 or patches.shape[1:] != (grid[0] * grid[1], values):
            cells = "L" if grid is None else grid[0] * grid[1]
            expected = f"expected (B, {values}, gh, gw), or (B, {cells}, {values}) with grid=(gh, gw)"
            raise ValueError(f"patches is {tuple(patches.shape)} and grid is {grid}: {expected}")
        gh, gw = grid
        images = patches.reshape(patches.shape[0], gh, gw, p, p, self.in_chans)
        return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, gh * p, gw * p)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return the patches per axis of images `(B, C, H, W)`.

        Raises:
            TypeError, ValueError: `images` is not floating, or a side is not a multiple of the patch size.
        """
        check_images(images, self.in_chans)
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images is {tuple(images.shape)}: height and width must be multiples of the patch size, "
                f"{self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size
