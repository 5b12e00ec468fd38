"""The fully convolutional masked autoencoder, FCMAE (arXiv 2301.00808, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsecnx.models.convnextv2 import init_weights
from sparsecnx.models.decoder import decoder_blocks, every_site, to_grid
from sparsecnx.models.encoders import stages_of
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.nn.layers import CONVOLUTIONS
from sparsecnx.tensor import SparseTensor


class FCMAE(MaskedAutoencoder):
    """An encoder on the visible patches, a light decoder on all, and by default the loss on the masked ones.

    It has the dimensions of its encoder: images, volumes or signals. The decoder has ConvNeXt V2 blocks with the
    kernel, epsilons and biases of a `ConvNeXtV2Encoder`, and for any other encoder with the published ones.

    Args:
        encoder: `ConvNeXtV2Encoder`, any ConvNet of timm, or a module that returns a feature map for a SparseTensor of
            the visible pixels, see `stages_of`. The decoder takes its last map.
        patch_size: pixels per patch side, one number or one for each axis, multiples of the encoder's stride; None is
            that stride, 32 for `ConvNeXtV2Encoder`.
        decoder_depth: blocks of the decoder.
        decoder_dim: channels of the decoder.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
        loss_on: the patches that the loss counts, `"masked"`, `"all"` or `"visible"`.

    Raises:
        TypeError, ValueError: the encoder has no feature maps of images, or `patch_size` does not fit its stride.
    """

    def __init__(
        self,
        encoder: nn.Module,
        patch_size: int | Sequence[int] | None = None,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        norm_pix_loss: bool = True,
        loss_on: str = "masked",
    ) -> None:
        stages = stages_of(encoder, patch_size)
        super().__init__(encoder, stages, patch_size, norm_pix_loss, loss_on=loss_on)
        conv = CONVOLUTIONS[self.ndim]
        self.proj = conv(stages.channels[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, *(1,) * self.ndim))
        self.decoder = decoder_blocks(encoder, decoder_depth, decoder_dim, self.ndim)
        # The kernel is 1x1 for the published 32-pixel patch. A larger patch is predicted from all its sites.
        sites = tuple(p // step for p, step in zip(self.patch, stages.strides[-1], strict=True))
        self.pred = conv(decoder_dim, math.prod(self.patch) * self.in_chans, sites, stride=sites)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for backward, see `ConvNeXtV2Encoder.set_grad_checkpointing`."""
        super().set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def predict(self, x: SparseTensor) -> Tensor:
        """Return the pixels of all patches, `(B, prod(patch) * C, *grid)`, from the visible ones."""
        return self.forward_decoder(self._stages.maps(self.encoder, x, last=1)[0])

    def forward_decoder(self, encoded: SparseTensor) -> Tensor:
        """Return predictions `(B, prod(patch) * C, *grid)` for the SparseTensor of the last stage."""
        return to_grid(self.pred(self.decoder(every_site(encoded, self.proj, self.mask_token, self.pred.kernel_size))))
