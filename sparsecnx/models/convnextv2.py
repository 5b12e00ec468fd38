"""ConvNeXt V2 (arXiv 2301.00808) in its eight sizes, dense and sparse with the same weights."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from sparsecnx.nn import ConvNeXtV2Block, LayerNorm2d
from sparsecnx.nn.layers import CONVOLUTIONS, axis_sizes
from sparsecnx.tensor import SparseTensor

STRIDE = 32  # pixels per site after the last stage, as published


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


class ConvNeXtV2Encoder(nn.Module):
    """The four stages: dense on images, sparse on images with a mask, with the same weights.

    State-dict names are the published ones: `downsample_layers.{0..3}.{0,1}` and
    `stages.{i}.{j}.{dwconv,norm,pwconv1,grn,pwconv2}`. Volumes and signals have other shapes of kernels under the same
    names.

    Attributes:
        num_features: channels of the last stage.
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

    Raises:
        ValueError: sizes do not fit `ndim`, a kernel is even, or the stages have not as many strides between them.
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
    ) -> None:
        super().__init__()
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
        first = Layers(conv(in_chans, dims[0], steps[0], stride=steps[0]), LayerNorm2d(dims[0]))
        self.downsample_layers = nn.ModuleList([first])
        for (dim, wider), step in zip(itertools.pairwise(dims), steps[1:], strict=True):
            self.downsample_layers.append(Layers(LayerNorm2d(dim), conv(dim, wider, step, stride=step)))
        last = max(sum(depths) - 1, 1)
        rates = (drop_path_rate * index / last for index in itertools.count())
        self.stages = nn.ModuleList(
            Layers(*(ConvNeXtV2Block(dim, next(rates), grn_scope, kernel_size, ndim) for _ in range(depth)))
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
        """Return the output of the last stage, see `forward_features`."""
        return self.forward_features(images, mask, visible)[-1]

    def forward_features(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> list[Any]:
        """Return the outputs of the four stages, of images at strides 4, 8, 16 and 32.

        Args:
            images: `(B, in_chans, *spatial)`, sides multiples of `stride` (32); or a SparseTensor of their visible
                pixels, without `mask`.
            mask: `(B, L)` or `(B, *grid)`, True or 1 = masked, on a grid of patches whose sides are multiples of
                `stride`, see `SparseTensor.from_dense`. None computes all sites, dense.
            visible: number of visible patches, if it is known and equal in all images, see `SparseTensor.from_dense`.

        Returns:
            SparseTensors with a mask or of a SparseTensor, otherwise dense tensors, of images
            `(B, dims[i], H / s, W / s)`.

        Raises:
            TypeError, ValueError: `images` or `mask` does not fit, see `SparseTensor.from_dense`.
        """
        return self._outputs(images, mask, visible)

    def _outputs(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> list[Any]:
        x: Any = images
        if isinstance(images, SparseTensor):
            if mask is not None:
                raise ValueError("mask is given: expected None, since images is a SparseTensor of the visible pixels")
            if images.features.shape[1] != self.in_chans or images.layout.ndim != self.ndim:
                raise ValueError(f"images is {tuple(images.shape)}: expected {shape_of(self.in_chans, self.ndim)}")
        else:
            check_images(images, self.in_chans, self.stride)
            if isinstance(mask, torch.fx.Proxy):
                raise TypeError(
                    "mask is traced: expected concrete_args={'mask': None, 'visible': None} of symbolic_trace"
                )
            x = images if mask is None else SparseTensor.from_dense(images, mask, visible)
        if isinstance(x, SparseTensor) and any(map(operator.mod, x.layout.tile, self.stride)):
            given = f"images is {tuple(images.shape)}" if mask is None else f"mask is {tuple(mask.shape)}"
            patch, stride = (one_if_equal(sizes) for sizes in (x.layout.tile, self.stride))
            raise ValueError(
                f"{given}: its patches of {patch} pixels must be a multiple of {stride}, the stride of the network"
            )
        outputs = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
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
            stop_early: without effect: every stage runs; `prune_intermediate_layers` removes stages.
            output_fmt: `"NCHW"`, channels before space, in other dimensions too.
            intermediates_only: True leaves out the first part of the result.

        Returns:
            The output of the last stage, and a list of the outputs of the chosen stages.

        Raises:
            ValueError: `indices` names a stage that is not there, or `output_fmt` is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW'")
        taken = self._taken(indices)
        outputs = self._outputs(x)
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
        kept = max(taken) + 1
        self.downsample_layers, self.stages = self.downsample_layers[:kept], self.stages[:kept]
        self.num_features = self.dims[kept - 1]
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


class ConvNeXtV2(ConvNeXtV2Encoder):
    """The classifier: stages, mean over space, LayerNorm, Linear. It has the methods of timm's models.

    Args:
        num_classes: outputs of the head; 0 leaves out its Linear.
        head_init_scale: factor on the initial head weights.
        drop_rate: dropout before the Linear of the head.
        global_pool: `"avg"`, or `""` for a head that runs at every site.
        **encoder: arguments of `ConvNeXtV2Encoder`.

    Raises:
        ValueError: `global_pool` is another one.
    """

    head: nn.Module
    global_pool: str

    def __init__(
        self,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **encoder: Any,
    ) -> None:
        super().__init__(**encoder)
        self.drop_rate = drop_rate
        self.head_hidden_size = self.num_features
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.reset_classifier(num_classes, global_pool)
        with torch.no_grad():
            for weight in self.head.parameters():  # the bias is 0
                weight.mul_(head_init_scale)

    def forward(self, images: Tensor | SparseTensor) -> Tensor:  # type: ignore[override]
        """Return logits `(B, num_classes)` for images `(B, in_chans, *spatial)` or for their visible pixels."""
        return self.forward_head(self.forward_features(images))

    def forward_features(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> Any:
        """Return the output of the last stage alone, as timm's classifiers do; `ConvNeXtV2Encoder` has the arguments.

        `forward_intermediates` returns those of all stages.
        """
        return self._outputs(images, mask, visible)[-1]

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Return logits for the output of the last stage; with `pre_logits` the features that the Linear takes."""
        pooled = self.global_pool == "avg"
        y = x.mean(dim=tuple(range(2, 2 + self.ndim))) if pooled else x.movedim(1, -1)
        y = nn.functional.dropout(self.norm(y), self.drop_rate, self.training)
        if not pre_logits:
            y = self.head(y)
        return y if pooled else y.movedim(-1, 1)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, a Linear, or an Identity if `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: outputs; 0 leaves it out.
            global_pool: as in the constructor; None keeps the present one.
        """
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool is {global_pool!r}: expected 'avg' or ''")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        where = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=where.device, dtype=where.dtype)
            init_weights(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and with `prune_norm` and `prune_head` parts of the head.

        Without its last stages a network loses its norm and head in any case.
        """
        stages = len(self.stages)
        taken = super().prune_intermediate_layers(indices)
        cut = len(self.stages) < stages
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        self.head_hidden_size = self.num_features
        return taken


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


def check_images(images: Tensor, channels: int, stride: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `images` is floating `(B, channels, *spatial)`, multiples of `stride`."""
    expected = shape_of(channels, len(stride))
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}: expected a floating tensor {expected}")
    if images.ndim != 2 + len(stride) or images.shape[1] != channels or images.shape[0] == 0:
        raise ValueError(f"images is {tuple(images.shape)}: expected {expected} with B >= 1")
    if 0 in images.shape or any(map(operator.mod, images.shape[2:], stride)):
        raise ValueError(
            f"images is {tuple(images.shape)}: its sides must be multiples of {one_if_equal(stride)}, the stride of "
            "the network"
        )


# Tracing leaves the check as it is: it reads shapes, which are known only when the graph runs.
torch.fx.wrap("check_images")
