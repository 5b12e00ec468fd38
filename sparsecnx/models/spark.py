"""SparK: masked pretraining of any ConvNet with a hierarchical decoder (arXiv 2301.03580)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparsecnx.models.encoders import stages_of
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.tensor import SparseTensor

NORMS = ("batch", "layer", "none")


class SparK(MaskedAutoencoder):
    """A ConvNet on the visible patches, and a light U-Net that fills in and decodes its feature maps (section 3).

    The map of each stride is normalised, its masked sites take a learned mask token, a convolution projects it, and the
    decoder adds it on its way from the coarsest to the pixels. `encoder.state_dict()` is that of the encoder alone.
    Parameters of `encoder` that no feature map needs, such as a classifier, get no gradient.

    Names of parameters are the published ones, after `sparse_encoder.sp_cnn.` became `encoder.` and `dense_decoder.`
    became `decoder.`. The published masks keep `round(L * (1 - mask_ratio))` patches, ours `int(...)`.

    Args:
        encoder: any ConvNet of timm, of this package, or a module that returns feature maps for a SparseTensor of the
            visible pixels, see `stages_of`.
        patch_size: pixels per patch side; None is the stride of the encoder, as published.
        levels: number of maps that the decoder takes, from the coarsest; all of them if the encoder has fewer.
        decoder_dim: channels of the decoder at the coarsest map; they halve with every stride.
        densify_norm: `"batch"`, `"layer"` or `"none"`, applied to the maps. None takes batch norm for an encoder that
            has some and layer norm for others, as published for ResNets and ConvNeXts.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
        below_tile: `"dense"` lets the stride of the encoder exceed the patch, see `SparseTensor.from_dense`. Maps of
            larger strides are dense, and take no mask token.

    Raises:
        TypeError, ValueError: the encoder has no feature maps of images, they do not halve from stride to stride, or an
            argument does not fit them.
    """

    _remedy = "; below_tile='dense' lets it go on dense below the patch"

    def __init__(
        self,
        encoder: nn.Module,
        patch_size: int | Sequence[int] | None = None,
        *,
        levels: int = 4,
        decoder_dim: int = 768,
        densify_norm: str | None = None,
        norm_pix_loss: bool = True,
        below_tile: str = "raise",
    ) -> None:
        stages = stages_of(encoder, patch_size if isinstance(patch_size, int) else None, below_tile)
        stride, name = stages.strides[-1], type(encoder).__name__
        super().__init__(encoder, stages, stride if patch_size is None else patch_size, norm_pix_loss, below_tile)
        halvings = stride.bit_length() - 1
        if levels < 1:
            raise ValueError(f"levels is {levels}: expected 1 or more")
        taken = stages.strides[-levels:]
        if stride != 1 << halvings or halvings == 0 or any(b != 2 * a for a, b in itertools.pairwise(taken)):
            raise ValueError(
                f"encoder is a {name} with feature maps of strides {stages.strides}: expected powers of 2 that double"
            )
        if decoder_dim < 1 or decoder_dim % (1 << halvings):
            raise ValueError(
                f"decoder_dim is {decoder_dim}: expected a multiple of {1 << halvings}, to be halved so often"
            )
        if densify_norm not in (None, *NORMS):
            raise ValueError(f"densify_norm is {densify_norm!r}: expected one of {', '.join(NORMS)}")
        if densify_norm is None:
            densify_norm = "batch" if any(isinstance(m, _BatchNorm) for m in encoder.modules()) else "layer"
        self.levels = levels = min(len(taken), halvings)
        self.mask_tokens = nn.ParameterList()
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(stages.channels[: -levels - 1 : -1]):  # the coarsest first
            width = decoder_dim >> level
            token = nn.init.trunc_normal_(torch.empty(1, channels, *(1,) * stages.ndim), std=0.02, a=-0.02, b=0.02)
            needed = stride >> level <= min(self._patch)  # A map below the patches has no masked sites.
            self.mask_tokens.append(nn.Parameter(token, requires_grad=needed))
            self.densify_norms.append(_norm(densify_norm, channels, stages.ndim))
            kernel = 1 if level == 0 else 3
            same = level == 0 and channels == width
            conv = _layer("Conv", stages.ndim)
            self.densify_projs.append(nn.Identity() if same else conv(channels, width, kernel, padding=kernel // 2))
        self.decoder = Decoder(decoder_dim, halvings, self.in_chans, stages.ndim)

    def predict(self, x: SparseTensor) -> Tensor:
        """Return the pixels of all patches, `(B, patch_size**2 * C, gh, gw)`, from the visible ones."""
        grid = x.layout.tiles.grid
        maps = [
            proj(_filled(norm(features), token))
            for features, norm, token, proj in zip(
                reversed(self._stages.maps(self.encoder, x, self.levels)),
                self.densify_norms,
                self.mask_tokens,
                self.densify_projs,
                strict=True,
            )
        ]
        return self._patches(self.decoder(maps), grid).mT.unflatten(2, grid)


class Decoder(nn.Module):
    """The light U-Net: a block that doubles the sides and halves the channels for each halving of the encoder.

    Args:
        dim: channels at the coarsest map.
        blocks: halvings of the encoder.
        out_chans: channels of the images.
        ndim: spatial dimensions.
    """

    def __init__(self, dim: int, blocks: int, out_chans: int, ndim: int = 2) -> None:
        super().__init__()
        self.dec = nn.ModuleList(UNetBlock(dim >> i, dim >> (i + 1), ndim) for i in range(blocks))
        self.proj = _layer("Conv", ndim)(dim >> blocks, out_chans, 1)
        self.apply(_init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return images `(B, out_chans, H, W)` for maps, the coarsest first; block i adds map i to its input."""
        x = maps[0]
        for i, block in enumerate(self.dec):
            x = block(x + maps[i] if 0 < i < len(maps) else x)
        return self.proj(x)


class UNetBlock(nn.Module):
    """Transposed convolution 4/2, convolution 3, batch norm, ReLU6, convolution 3, batch norm (appendix A)."""

    def __init__(self, in_chans: int, out_chans: int, ndim: int = 2) -> None:
        super().__init__()
        conv, norm = _layer("Conv", ndim), _layer("BatchNorm", ndim)
        self.up_sample = _layer("ConvTranspose", ndim)(in_chans, in_chans, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            conv(in_chans, in_chans, 3, padding=1, bias=False),
            norm(in_chans),
            nn.ReLU6(inplace=True),
            conv(in_chans, out_chans, 3, padding=1, bias=False),
            norm(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_chans, H, W)` to `(B, out_chans, 2H, 2W)`."""
        return self.conv(self.up_sample(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every site, of maps of any number of dimensions."""

    def forward(self, input: Any) -> Any:
        """Take `(B, C, *spatial)` or a SparseTensor; return the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _filled(features: SparseTensor | Tensor, token: Tensor) -> Tensor:
    """Return a dense map whose masked sites hold the token."""
    return features.dense(fill=token.flatten()) if isinstance(features, SparseTensor) else features


def _layer(name: str, ndim: int) -> Any:
    return getattr(nn, f"{name}{ndim}d")


def _norm(kind: str, channels: int, ndim: int) -> nn.Module:
    if kind == "batch":
        return _layer("BatchNorm", ndim)(channels)
    return ChannelNorm(channels, eps=1e-6) if kind == "layer" else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, _ConvNd):
        if module.transposed:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
