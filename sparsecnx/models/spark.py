"""SparK: masked pretraining of any ConvNet with a hierarchical decoder (arXiv 2301.03580)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparsecnx.models.convnextv2 import one_if_equal
from sparsecnx.models.encoders import stages_of
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.models.patches import patchify
from sparsecnx.nn import LayerNorm2d
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
        patch_size: pixels per patch side, one number or one for each axis; None is the stride of the encoder, as
            published.
        levels: number of maps that the decoder takes, from the coarsest; all of them if the encoder has fewer.
        decoder_dim: channels of the decoder at the coarsest map; they halve with every block, which doubles the sides
            that the encoder halved.
        densify_norm: `"batch"`, `"layer"` or `"none"`, applied to the maps. None takes batch norm for an encoder that
            has some and layer norm for others, as published for ResNets and ConvNeXts.
        norm_pix_loss: True normalises the target pixels of every patch to zero mean and unit variance.
        below_tile: `"dense"` lets the stride of the encoder exceed the patch, see `SparseTensor.from_dense`. Maps of
            larger strides are dense, and take no mask token.
        loss_on: the patches that the loss counts, `"masked"`, `"all"` or `"visible"`.

    Raises:
        TypeError, ValueError: the encoder has no feature maps of images, no side of one or another side than its half
            follows from map to map, or an argument does not fit them.
    """

    paper = "https://arxiv.org/abs/2301.03580"
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
        loss_on: str = "masked",
    ) -> None:
        stages = stages_of(encoder, patch_size, below_tile)
        super().__init__(encoder, stages, patch_size, norm_pix_loss, below_tile, loss_on)
        if levels < 1:
            raise ValueError(f"levels is {levels}: expected 1 or more")
        taken = stages.strides[: -levels - 1 : -1]  # the coarsest first
        factors = _doublings(taken)
        if not factors:
            strides = tuple(map(one_if_equal, stages.strides))
            raise ValueError(
                f"encoder is a {type(encoder).__name__} with feature maps of strides {strides}: expected powers of 2 "
                "that double"
            )
        halvings = len(factors)
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
        for level, (channels, stride) in enumerate(zip(stages.channels[::-1], taken[:levels], strict=False)):
            width = decoder_dim >> level
            token = nn.init.trunc_normal_(torch.empty(1, channels, *(1,) * stages.ndim), std=0.02, a=-0.02, b=0.02)
            # A map below the patches has no masked sites.
            needed = all(s <= p for s, p in zip(stride, self.patch, strict=True))
            self.mask_tokens.append(nn.Parameter(token, requires_grad=needed))
            self.densify_norms.append(_norm(densify_norm, channels, stages.ndim))
            kernel = 1 if level == 0 else 3
            same = level == 0 and channels == width
            conv = _layer("Conv", stages.ndim)
            self.densify_projs.append(nn.Identity() if same else conv(channels, width, kernel, padding=kernel // 2))
        self.decoder = Decoder(decoder_dim, factors, self.in_chans)

    def predict(self, x: SparseTensor) -> Tensor:
        """Return the pixels of all patches, `(B, prod(patch) * C, *grid)`, from the visible ones."""
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
        return patchify(self.decoder(maps), self.patch).mT.unflatten(2, grid)


class Decoder(nn.Module):
    """The light U-Net: a block that doubles the sides and halves the channels for each halving of the encoder.

    Args:
        dim: channels at the coarsest map.
        factors: by how much each block enlarges its input along each axis, 2 or 1.
        out_chans: channels of the images.
    """

    def __init__(self, dim: int, factors: Sequence[tuple[int, ...]], out_chans: int) -> None:
        super().__init__()
        self.dec = nn.ModuleList(UNetBlock(dim >> i, dim >> (i + 1), factor) for i, factor in enumerate(factors))
        self.proj = _layer("Conv", len(factors[0]))(dim >> len(factors), out_chans, 1)
        self.apply(_init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return images `(B, out_chans, *spatial)` for maps, the coarsest first; block i adds map i to its input."""
        x = maps[0]
        for i, block in enumerate(self.dec):
            x = block(x + maps[i] if 0 < i < len(maps) else x)
        return self.proj(x)


class UNetBlock(nn.Module):
    """Transposed convolution 4/2, convolution 3, batch norm, ReLU6, convolution 3, batch norm (appendix A).

    Along an axis that it does not double the transposed convolution is 3/1.
    """

    def __init__(self, in_chans: int, out_chans: int, factor: tuple[int, ...]) -> None:
        super().__init__()
        ndim, kernel = len(factor), tuple(step + 2 for step in factor)
        conv, norm = _layer("Conv", ndim), _layer("BatchNorm", ndim)
        self.up_sample = _layer("ConvTranspose", ndim)(in_chans, in_chans, kernel, stride=factor, padding=1)
        self.conv = nn.Sequential(
            conv(in_chans, in_chans, 3, padding=1, bias=False),
            norm(in_chans),
            nn.ReLU6(inplace=True),
            conv(in_chans, out_chans, 3, padding=1, bias=False),
            norm(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_chans, H, W)` to `(B, out_chans, 2H, 2W)`, or likewise by its factor."""
        return self.conv(self.up_sample(x))


def _doublings(strides: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return by how much a decoder enlarges each map to the next, and the last of them to the pixels, 2 or 1 an axis.

    Args:
        strides: those of the maps, the coarsest first.

    Returns:
        A factor for each axis and block; an empty list where none will do.
    """
    last = strides[-1]
    while max(last) > 1:
        last = tuple(-(-stride // 2) for stride in last)
        strides = [*strides, last]
    pairs = list(itertools.pairwise(strides))
    whole = all(b in (a, a / 2) for coarse, fine in pairs for a, b in zip(coarse, fine, strict=True))
    if not whole or any(coarse == fine for coarse, fine in pairs):
        return []
    return [tuple(a // b for a, b in zip(coarse, fine, strict=True)) for coarse, fine in pairs]


def _filled(features: SparseTensor | Tensor, token: Tensor) -> Tensor:
    """Return a dense map whose masked sites hold the token."""
    return features.dense(fill=token.flatten()) if isinstance(features, SparseTensor) else features


def _layer(name: str, ndim: int) -> Any:
    return getattr(nn, f"{name}{ndim}d")


def _norm(kind: str, channels: int, ndim: int) -> nn.Module:
    if kind == "batch":
        return _layer("BatchNorm", ndim)(channels)
    return LayerNorm2d(channels) if kind == "layer" else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, _ConvNd):
        if module.transposed:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
