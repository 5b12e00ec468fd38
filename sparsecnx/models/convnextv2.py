"""ConvNeXt V2 (arXiv 2301.00808) in its eight sizes, dense and sparse with the same weights.

Its options make other networks of the family: ConvNeXt (arXiv 2201.03545), and that of MP-MAE (arXiv 2405.02771).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from sparsecnx.models.pretrained import Pretrained
from sparsecnx.nn import ConvNeXtBlock, ConvNeXtV2Block, LayerNorm2d
from sparsecnx.nn.layers import CONVOLUTIONS, axis_sizes
from sparsecnx.tensor import SparseTensor

STRIDE = 32  # pixels per site after the last stage, as published
BLOCKS = ("v2", "v1")
STEMS = ("patchify", "conv3x3")


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
        for layer in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                input = checkpoint(layer, input, use_reentrant=False)
            else:
                input = layer(input)
        return input


class ConvNeXtV2Encoder(Pretrained):
    """The four stages: dense on images, sparse on images with a mask, with the same weights.

    State-dict names are the published ones: `downsample_layers.{0..3}.{0,1}` and
    `stages.{i}.{j}.{dwconv,norm,pwconv1,grn,pwconv2}`, of blocks v1 `gamma` instead of `grn`. Volumes and signals have
    other shapes of kernels under the same names.

    Attributes:
        num_features: channels of the last stage.
        block_options: arguments of every block beside its channels and rates.
        stride: pixels per site after the last stage, along each axis.
        feature_info: channels, stride and name of every stage, as timm's models have it: the largest stride of an axis
            is its `reduction`, `strides` holds that of each.

    Args:
        depths, dims: blocks and channels of the stages.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over the blocks.
        grn_scope: groups of GRN under a mask, `"sample"` or `"batch"` (as in the published sparse code).
        ndim: spatial dimensions: 2 for images, 3 for volumes, 1 for signals.
        kernel_size: odd size of the depthwise kernels, one number or one for each axis, such as `(3, 7, 7)`.
        stem: pixels per site of the first stage, likewise, such as `(2, 4, 4)`.
        strides: of the convolution before each later stage; one number for all, or for each one number or one for each
            axis, such as `((1, 2, 2), 2, 2)`.
        stem_type: `"patchify"`, as published: a convolution whose kernel and stride are `stem`, and LayerNorm. Or
            `"conv3x3"`, that of MP-MAE: a convolution of 3 pixels (1 on an axis whose `kernel_size` is 1), LayerNorm
            and GELU at every pixel; then a depthwise convolution whose kernel and stride are `stem`, and LayerNorm.
        block: `"v2"`, or `"v1"` for the block of the first ConvNeXt, `nn.ConvNeXtBlock`, which has LayerScale, no GRN.
        norm_eps: epsilon of every LayerNorm of the encoder, added to the variance.
        grn_eps: epsilon of GRN, added to the mean over channels.
        dwconv_bias: False leaves out the bias of the depthwise convolutions of the blocks.

    Raises:
        ValueError: sizes do not fit `ndim`, a kernel is even, the stages have not as many strides between them,
            `stem_type` or `block` is another one, or an option of GRN is given to blocks without one.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grn_scope: str = "sample",
        *,
        ndim: int = 2,
        kernel_size: int | Sequence[int] = 7,
        stem: int | Sequence[int] = 4,
        strides: int | Sequence[int | Sequence[int]] = 2,
        stem_type: str = "patchify",
        block: str = "v2",
        norm_eps: float = 1e-6,
        grn_eps: float = 1e-6,
        dwconv_bias: bool = True,
    ) -> None:
        super().__init__()
        if stem_type not in STEMS:
            raise ValueError(f"stem_type is {stem_type!r}: expected one of {', '.join(STEMS)}")
        if block not in BLOCKS:
            raise ValueError(f"block is {block!r}: expected one of {', '.join(BLOCKS)}")
        for name, value, default in (("grn_scope", grn_scope, "sample"), ("grn_eps", grn_eps, 1e-6)):
            if block == "v1" and value != default:
                raise ValueError(f"{name} is {value!r}: expected {default!r}, since the blocks v1 have no GRN")
        self.in_chans, self.ndim = in_chans, ndim
        self.dims = tuple(dims)
        self.num_features = self.dims[-1]
        self.kernel_size = axis_sizes("kernel_size", kernel_size, ndim)
        between = [strides] * (len(dims) - 1) if isinstance(strides, int) else strides
        steps = [axis_sizes("stem", stem, ndim), *(axis_sizes("strides", stride, ndim) for stride in between)]
        if len(steps) != len(dims):
            raise ValueError(f"strides is {strides}: expected one number, or {len(dims) - 1} for {len(dims)} stages")
        totals = list(itertools.accumulate(steps, lambda fine, step: tuple(map(operator.mul, fine, step))))
        self.stride = totals[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": max(total), "strides": total, "module": f"stages.{stage}"}
            for stage, (dim, total) in enumerate(zip(dims, totals, strict=True))
        ]
        conv = CONVOLUTIONS[ndim]
        self.downsample_layers = nn.ModuleList([self._stem(stem_type, steps[0], norm_eps)])
        for (dim, wider), step in zip(itertools.pairwise(dims), steps[1:], strict=True):
            self.downsample_layers.append(Layers(LayerNorm2d(dim, norm_eps), conv(dim, wider, step, stride=step)))
        self.block_options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "ndim": ndim,
            "norm_eps": norm_eps,
            "dwconv_bias": dwconv_bias,
        }
        make: Any = ConvNeXtBlock
        if block == "v2":
            self.block_options["grn_eps"] = grn_eps
            make = functools.partial(ConvNeXtV2Block, grn_scope=grn_scope)
        last = max(sum(depths) - 1, 1)
        rates = (drop_path_rate * index / last for index in itertools.count())
        self.stages = nn.ModuleList(
            Layers(*(make(dim, next(rates), **self.block_options) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def _stem(self, kind: str, step: tuple[int, ...], eps: float) -> Layers:
        conv, dim = CONVOLUTIONS[self.ndim], self.dims[0]
        if kind == "patchify":
            return Layers(conv(self.in_chans, dim, step, stride=step), LayerNorm2d(dim, eps))
        kernel = tuple(min(size, 3) for size in self.kernel_size)
        return Layers(
            conv(self.in_chans, dim, kernel, padding=tuple(size // 2 for size in kernel)),
            LayerNorm2d(dim, eps),
            nn.GELU(),
            conv(dim, dim, step, stride=step, groups=dim),
            LayerNorm2d(dim, eps),
        )

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
        """Return the output of the last stage, see `forward_features`."""
        return self.forward_features(images, mask, visible)[-1]

    def forward_features(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> list[Any]:
        """Return the outputs of the four stages, of images at strides 4, 8, 16 and 32.

        Args:
            images: `(B, in_chans, *spatial)`, with a mask of sides that are multiples of `stride` (32), without one of
                any sides from `stride` on; or a SparseTensor of their visible pixels, without `mask`.
            mask: `(B, L)` or `(B, *grid)`, True or 1 = masked, on a grid of patches whose sides are multiples of
                `stride`, see `SparseTensor.from_dense`. None computes all sites, dense.
            visible: number of visible patches, if it is known and equal in all images, see `SparseTensor.from_dense`.

        Returns:
            SparseTensors with a mask or of a SparseTensor, otherwise dense tensors, of images
            `(B, dims[i], H // s, W // s)`.

        Raises:
            TypeError, ValueError: `images` or `mask` does not fit, see `SparseTensor.from_dense`.
        """
        return self._outputs(images, mask, visible)

    def _outputs(
        self,
        images: Tensor | SparseTensor,
        mask: Tensor | None = None,
        visible: int | None = None,
        count: int | None = None,
    ) -> list[Any]:
        """Return the outputs of the first `count` stages, of all if it is None."""
        x: Any = images
        if isinstance(images, SparseTensor):
            if mask is not None:
                raise ValueError("mask is given: expected None, since images is a SparseTensor of the visible pixels")
            if images.features.shape[1] != self.in_chans or images.layout.ndim != self.ndim:
                raise ValueError(f"images is {tuple(images.shape)}: expected {shape_of(self.in_chans, self.ndim)}")
        else:
            if isinstance(mask, torch.fx.Proxy):
                raise TypeError(
                    "mask is traced: expected concrete_args={'mask': None, 'visible': None} of symbolic_trace"
                )
            if mask is None:
                check_images(images, self.in_chans, self.stride)
            else:
                check_patches(images, self.in_chans, self.stride, "the stride of the network")
                x = SparseTensor.from_dense(images, mask, visible)
        if isinstance(x, SparseTensor) and any(map(operator.mod, x.layout.tile, self.stride)):
            given = f"images is {tuple(images.shape)}" if mask is None else f"mask is {tuple(mask.shape)}"
            patch, stride = (one_if_equal(sizes) for sizes in (x.layout.tile, self.stride))
            raise ValueError(
                f"{given}: its patches of {patch} pixels must be a multiple of {stride}, the stride of the network"
            )
        outputs = []
        for downsample, stage in itertools.islice(zip(self.downsample_layers, self.stages, strict=True), count):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs

    def forward_intermediates(
        self,
        x: Tensor | SparseTensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the outputs of chosen stages, as this method of timm's models does.

        Args:
            x: images `(B, in_chans, *spatial)`, or a SparseTensor of their visible pixels.
            indices: numbers of stages, from the end if negative; an int takes that many last stages, None all.
            norm: without effect, as in timm's ConvNeXt: the norm is a part of the head.
            stop_early: True runs no stage after the last of `indices`. `prune_intermediate_layers` removes them.
            output_fmt: `"NCHW"`, channels before space, in other dimensions too.
            intermediates_only: True leaves out the first part of the result, and stops early.

        Returns:
            The output of the last stage that ran, and a list of the outputs of the chosen stages, the finest first.

        Raises:
            ValueError: `indices` names a stage that is not there, or `output_fmt` is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW'")
        taken = self._taken(indices)
        outputs = self._outputs(x, count=taken[-1] + 1 if stop_early or intermediates_only else None)
        chosen = [outputs[stage] for stage in taken]
        return chosen if intermediates_only else (outputs[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and return these; timm's `features_only=True` calls it.

        Args:
            indices: see `forward_intermediates`.
            prune_norm, prune_head: see `ConvNeXtV2`; an encoder has neither.
        """
        taken = self._taken(indices)
        kept = taken[-1] + 1
        self.downsample_layers, self.stages = self.downsample_layers[:kept], self.stages[:kept]
        self.num_features, self.stride = self.dims[kept - 1], self.feature_info[kept - 1]["strides"]
        return taken

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the chosen stages, counted from 0, in the order of the network."""
        count = len(self.stages)
        if isinstance(indices, int):
            indices = range(-indices, 0)
        taken = range(count) if indices is None else [i + count if i < 0 else i for i in indices]
        if not taken or not all(0 <= i < count for i in taken):
            raise ValueError(f"indices is {indices}: expected some of the {count} stages, 0 to {count - 1}")
        return sorted(set(taken))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that no optimizer should decay: GRN's, which timm does not see as vectors."""
        return {name for name, _ in self.named_parameters() if ".grn." in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm puts parameters into layers, for layer-wise learning rates."""
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:downsample_layers|stages)\.(\d+)" if coarse else blocks,
        }


def init_weights(module: nn.Module) -> None:
    """Draw weights of convolutions and linear layers from a truncated normal with std 0.02, and set biases to 0."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def one_if_equal(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return the size that all axes have, or the sizes where they differ."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def shape_of(channels: int, ndim: int) -> str:
    """Return the shape that images have, for an error: `(B, 3, H, W)`."""
    return f"(B, {channels}, {', '.join('DHW'[3 - ndim :])})"


def check_images(images: Tensor, channels: int, least: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `images` is floating `(B, channels, *spatial)`, its sides not below `least`.

    Args:
        least: the stride of the network, which leaves one site of its last stage.
    """
    expected = shape_of(channels, len(least))
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}: expected a floating tensor {expected}")
    if images.ndim != 2 + len(least) or images.shape[1] != channels or images.shape[0] == 0:
        raise ValueError(f"images is {tuple(images.shape)}: expected {expected} with B >= 1")
    if any(map(operator.lt, images.shape[2:], least)):
        raise ValueError(
            f"images is {tuple(images.shape)}: its sides must be at least {one_if_equal(least)}, "
            "the stride of the network"
        )


def check_patches(images: Tensor, channels: int, sides: tuple[int, ...], called: str) -> None:
    """Raise TypeError or ValueError unless `images` is floating `(B, channels, *spatial)`, multiples of `sides`.

    Args:
        called: what errors call `sides`.
    """
    check_images(images, channels, (0,) * len(sides))
    if 0 in images.shape or any(map(operator.mod, images.shape[2:], sides)):
        raise ValueError(
            f"images is {tuple(images.shape)}: its sides must be multiples of {one_if_equal(sides)}, {called}"
        )


# Tracing leaves the check as it is: it reads shapes, which are known only when the graph runs.
torch.fx.wrap("check_images")
