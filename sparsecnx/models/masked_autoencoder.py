"""Share what masked autoencoders of one image have in common: patches, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsecnx.models.encoders import Stages
from sparsecnx.models.masked_encoder import MaskedEncoder, without_invalid
from sparsecnx.models.patches import check_loss_on, counted_patches, patchify, squared_errors
from sparsecnx.tensor import SparseTensor


class MaskedAutoencoder(MaskedEncoder, abstract=True):
    """Mask images, predict all patches from the visible ones, and compare. A subclass defines `predict`.

    Args:
        encoder, stages, patch_size, below_tile: see `MaskedEncoder`.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
        loss_on: the patches that the loss counts, `"masked"`, `"all"` or `"visible"`.

    Raises:
        ValueError: `patch_size` does not fit the encoder, see `MaskedEncoder`, or `loss_on` is another one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        stages: Stages,
        patch_size: int | Sequence[int] | None,
        norm_pix_loss: bool = True,
        below_tile: str = "raise",
        loss_on: str = "masked",
    ) -> None:
        super().__init__(encoder, stages, patch_size, below_tile)
        check_loss_on(loss_on)
        self.norm_pix_loss, self.loss_on = norm_pix_loss, loss_on
        self._needs_masked = loss_on == "masked"

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        valid: Tensor | None = None,
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
            valid: bool of the shape of `images`, or `(B, 1, *spatial)` for all channels; False = the pixel has no
                value, such as NaN or nodata. It enters the network as 0 and has no part in the loss.
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
        x, mask = self.mask_images(images, mask_ratio, mask, valid=valid, visible=visible, generator=generator)
        pred = self.predict(x)
        return self.reconstruction_loss(images, pred, mask, valid), pred, mask

    def predict(self, x: SparseTensor) -> Tensor:
        """Return the pixels of all patches, `(B, prod(patch) * C, *grid)`, from the visible ones."""
        raise NotImplementedError

    def reconstruction_loss(self, images: Tensor, pred: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the mean error of the patches that count, 0 if there is none.

        The error of a patch is the mean squared error of its valid pixels. With `norm_pix_loss` the target of a patch
        is `(t - mean) / sqrt(var + 1e-6)`, of its valid pixels, var unbiased. Patches count as `loss_on` says; those
        without a valid pixel do not.

        Args:
            images, valid: see `forward`.
            pred, mask: as `forward` returns them.
        """
        total, count = self.summed_error(images, pred, mask, valid)
        return total / count.clamp(min=1)

    def summed_error(
        self, images: Tensor, pred: Tensor, mask: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the errors of the patches that count, and their number, whose quotient is the loss.

        Processes that hold different numbers of such patches have the loss of all of them if each adds up both.

        Args:
            images, pred, mask, valid: see `reconstruction_loss`.
        """
        self.grid(images)
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        target = patchify(without_invalid(images, valid), self.patch)
        there = None if valid is None else patchify(valid.expand_as(images), self.patch)
        error = squared_errors(pred.flatten(2).mT.to(target.dtype), target, there, self.norm_pix_loss)
        counted = counted_patches(mask, self.loss_on, there)
        return (error * counted).sum(), counted.sum()
