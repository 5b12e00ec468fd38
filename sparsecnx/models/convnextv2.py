"""ConvNeXt V2 (arXiv 2301.00808) in its eight sizes, dense and sparse with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsecnx.geometry.masks import format_shape
from sparsecnx.nn import Conv2d, ConvNeXtV2Block, LayerNorm2d
from sparsecnx.nn.layers import refuse_backward_hooks
from sparsecnx.tensor import SparseTensor

STRIDE = 32  # pixels per site after the last stage


@dataclass(frozen=True)
class Size:
    """Blocks and channels of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


# The sizes are those of the paper's appendix A.1, table 7 (atto to nano follow timm), and section 5.
SIZES = {
    "atto": Size((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": Size((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": Size((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": Size((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": Size((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": Size((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": Size((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": Size((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


def get_size(name: str) -> Size:
    """Return the size with this name.

    Raises:
        ValueError: there is none.
    """
    if name not in SIZES:
        raise ValueError(f"size is {name!r}: expected one of {', '.join(SIZES)}")
    return SIZES[name]


class Layers(nn.Sequential):
    """Call one layer after the other, on dense and on SparseTensors.

    Attributes:
        grad_checkpointing: True keeps only what goes into each layer; backward calls the layer again.
    """

    grad_checkpointing = False

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Return what the last layer returns."""
        refuse_backward_hooks(self, input)
        for layer in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                input = checkpoint(layer, input, use_reentrant=False)
            else:
                input = layer(input)
        return input


class ConvNeXtV2Encoder(nn.Module):
    """The four stages: dense on images, sparse on images with a mask, with the same weights.

    State-dict names are the published ones: `downsample_layers.{0..3}.{0,1}` and
    `stages.{i}.{j}.{dwconv,norm,pwconv1,grn,pwconv2}`.

    Args:
        depths, dims: blocks and channels of the stages.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over the blocks.
        grn_scope: groups of GRN under a mask, `"sample"` or `"batch"` (as in the published sparse code).
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grn_scope: str = "sample",
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.dims = tuple(dims)
        self.downsample_layers = nn.ModuleList([Layers(Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0]))])
        for dim, wider in itertools.pairwise(dims):
            self.downsample_layers.append(Layers(LayerNorm2d(dim), Conv2d(dim, wider, 2, stride=2)))
        last = max(sum(depths) - 1, 1)
        rates = (drop_path_rate * index / last for index in itertools.count())
        self.stages = nn.ModuleList(
            Layers(*(ConvNeXtV2Block(dim, next(rates), grn_scope) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for backward, which computes the block again: less memory, more time.

        Gradients are the same, stochastic depth included.

        Raises:
            TypeError: a stage was replaced by a module that is not `Layers`.
        """
        for stage in self.stages:
            if not isinstance(stage, Layers):
                raise TypeError(f"stages holds a {type(stage).__name__}: set_grad_checkpointing needs Layers")
            stage.grad_checkpointing = enable

    def forward(self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None) -> Any:
        """Return the output of the last stage, at stride 32, see `forward_features`."""
        return self.forward_features(images, mask, visible)[-1]

    def forward_features(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> list[Any]:
        """Return the outputs of the four stages, at strides 4, 8, 16 and 32.

        Args:
            images: `(B, in_chans, H, W)`, H and W multiples of 32; or a SparseTensor of their visible pixels, without
                `mask`.
            mask: bool `(B, L)` or `(B, gh, gw)`, True = masked, on a grid of square patches whose side is a multiple of
                32 pixels. None computes all sites, dense.
            visible: number of visible patches, if it is known and equal in all images, see `SparseTensor.from_dense`.

        Returns:
            SparseTensors with a mask or of a SparseTensor, otherwise dense tensors `(B, dims[i], H / s, W / s)`.

        Raises:
            TypeError, ValueError: `images` or `mask` does not fit, see `SparseTensor.from_dense`.
        """
        x: Any = images
        if isinstance(images, SparseTensor):
            if mask is not None:
                raise ValueError("mask is given: expected None, since images is a SparseTensor of the visible pixels")
            if images.features.shape[1] != self.in_chans:
                raise ValueError(f"images is {images.shape}: expected (B, {self.in_chans}, H, W)")
        else:
            check_images(images, self.in_chans)
            x = images if mask is None else SparseTensor.from_dense(images, mask, visible)
        if isinstance(x, SparseTensor) and any(side % STRIDE for side in x.layout.tile):
            given = f"images is {images.shape}" if mask is None else f"mask is {tuple(mask.shape)}"
            raise ValueError(
                f"{given}: its patches of {format_shape(x.layout.tile)} pixels must be a multiple of {STRIDE}, the "
                "stride of the network"
            )
        refuse_backward_hooks(self, x)
        outputs = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs


class ConvNeXtV2(ConvNeXtV2Encoder):
    """The classifier: stages, mean over space, LayerNorm, Linear.

    Args:
        num_classes: outputs of the head.
        head_init_scale: factor on the initial head weights.
        **encoder: arguments of `ConvNeXtV2Encoder`.
    """

    def __init__(self, num_classes: int = 1000, head_init_scale: float = 1.0, **encoder: Any) -> None:
        super().__init__(**encoder)
        self.norm = nn.LayerNorm(self.dims[-1], eps=1e-6)
        self.head = nn.Linear(self.dims[-1], num_classes)
        init_weights(self.head)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits `(B, num_classes)` for images `(B, in_chans, H, W)`."""
        return self.head(self.norm(super().forward(images).mean(dim=(2, 3))))


def init_weights(module: nn.Module) -> None:
    """Draw weights of convolutions and linear layers from a truncated normal with std 0.02, and set biases to 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_images(images: Tensor, channels: int) -> None:
    """Raise TypeError or ValueError unless `images` is floating `(B, channels, H, W)`, H and W multiples of 32."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}: expected a floating tensor (B, {channels}, H, W)")
    if images.ndim != 4 or images.shape[1] != channels or images.shape[0] == 0:
        raise ValueError(f"images is {tuple(images.shape)}: expected (B, {channels}, H, W) with B >= 1")
    if images.shape[2] % STRIDE or images.shape[3] % STRIDE or 0 in images.shape:
        raise ValueError(f"images is {tuple(images.shape)}: height and width must be multiples of {STRIDE}")


def create_convnextv2(size: str, **options: Any) -> ConvNeXtV2:
    """Build the classifier of a named size; options are those of `ConvNeXtV2`.

    Raises:
        ValueError: there is no such size.
    """
    config = get_size(size)
    return ConvNeXtV2(depths=config.depths, dims=config.dims, **options)


convnextv2_atto = partial(create_convnextv2, "atto")
convnextv2_femto = partial(create_convnextv2, "femto")
convnextv2_pico = partial(create_convnextv2, "pico")
convnextv2_nano = partial(create_convnextv2, "nano")
convnextv2_tiny = partial(create_convnextv2, "tiny")
convnextv2_base = partial(create_convnextv2, "base")
convnextv2_large = partial(create_convnextv2, "large")
convnextv2_huge = partial(create_convnextv2, "huge")
