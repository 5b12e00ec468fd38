"""Detectors of torchvision on pretrained networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from sparsecnx.common.errors import InputError
from sparsecnx.models.encoders import stages_of
from sparsecnx.train.data.scale import IMAGENET_MEAN, IMAGENET_STD
from sparsecnx.train.recipe import Recipe
from sparsecnx.transfer.features import load_pretrained

# As in torchvision: the last maps that the pyramid takes, and the smallest anchors of a level in strides.
KINDS = {"maskrcnn": MaskRCNN, "retinanet": RetinaNet}
MAPS = {"maskrcnn": 4, "retinanet": 3}
ANCHOR = {"maskrcnn": 8, "retinanet": 4}
RATIOS = (0.5, 1.0, 2.0)
SMALLEST_DIVISOR = 32  # torchvision pads images to a multiple of it


class FeaturePyramid(nn.Module):
    """Feature pyramid on the last maps of any encoder: the backbone of a detector.

    Args:
        encoder: see `stages_of`; images have two dimensions.
        maps: how many of its last maps the pyramid takes, fewer where it has fewer.
        out_channels: channels of the pyramid.
        extra_blocks: makes the levels beyond the last map.

    Raises:
        InputError: the encoder has no such maps.
    """

    def __init__(self, encoder: nn.Module, maps: int, out_channels: int, extra_blocks: nn.Module) -> None:
        super().__init__()
        try:
            self._stages = stages_of(encoder)
        except (TypeError, ValueError) as error:
            raise InputError("backbone", type(encoder).__name__, str(error)) from error
        self.in_chans = self._stages.in_chans
        strides = self._stages.strides[-maps:]
        if not all(len(stride) == 2 and stride[0] == stride[1] and math.log2(stride[0]) % 1 == 0 for stride in strides):
            problem = f"its strides are {strides}; expected those of images, powers of two, the same on both axes"
            raise InputError("backbone", type(encoder).__name__, problem)
        self.strides = [stride[0] for stride in strides]
        self.body = encoder
        self.fpn = FeaturePyramidNetwork(
            list(self._stages.channels[-maps:]), out_channels, extra_blocks=extra_blocks, norm_layer=None
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the levels of the pyramid by name, the finest first, `(B, out_channels, *)` each.

        Args:
            images: `(B, C, H, W)`, normalised; the sides are multiples of the largest stride.
        """
        maps: Any = self._stages.maps(self.body, images, last=len(self.strides))  # type: ignore[arg-type]
        return self.fpn({str(level): one for level, one in enumerate(maps)})


def detector(
    backbone: str | Path | nn.Module,
    classes: int,
    kind: str = "maskrcnn",
    model: str | None = None,
    out_channels: int = 256,
    **options: Any,
) -> nn.Module:
    """Return torchvision's Mask R-CNN or RetinaNet on a network, with a feature pyramid between them.

    It takes a list of images `(C, H, W)` of any sides, floats from 0 to 1, and in training targets, which it checks,
    see `check_target`. It normalises images as in pretraining: 0 and 1 are the ends of its value range. If the
    pretraining had none, give images in the units of its files; if it normalised each image by its own statistics,
    give normalised images. Norms stay what they are: unlike torchvision's, batch norm is not frozen.

    Args:
        backbone: a checkpoint of `sparsecnx pretrain`; with `model` a file of weights; or a network, see `stages_of`.
        classes: kinds of objects. Their labels are 1 to `classes`.
        kind: `"maskrcnn"`, which also returns masks, or `"retinanet"`.
        model: name of the network of a file of weights, see `load_pretrained`.
        out_channels: channels of the pyramid.
        **options: arguments of torchvision's `MaskRCNN` or `RetinaNet`, such as `min_size`, the pixels that it resizes
            the shorter side of images to, 800, or `image_mean` and `image_std`. By default those of a network are what
            timm says, or ImageNet's. The smallest anchors have 8 times (RetinaNet: 4 times) the stride of their level.

    Raises:
        InputError: an argument is none of these, or the network is not for images.
    """
    if kind not in KINDS:
        raise InputError("kind", repr(kind), f"expected one of {', '.join(KINDS)}")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise InputError("classes", repr(classes), "expected a whole number, 1 or more")
    known = {*signature(KINDS[kind]).parameters, *signature(GeneralizedRCNNTransform).parameters}
    for name in options.keys() - known:  # torchvision ignores them
        raise InputError(name, options[name], f"{KINDS[kind].__name__} of torchvision has no such argument")
    if isinstance(backbone, (str, Path)):
        found = load_pretrained(backbone, model)
        encoder, scale = found.encoder, _scale_of_recipe(found.recipe)
    elif model is None:
        encoder, scale = backbone, _scale_of_network(backbone)
    else:
        raise InputError("model", repr(model), "expected none, since the backbone is a network and not a file")
    extra = LastLevelMaxPool() if kind == "maskrcnn" else LastLevelP6P7(out_channels, out_channels)
    pyramid = FeaturePyramid(encoder, MAPS[kind], out_channels, extra)
    for name, values in zip(("image_mean", "image_std"), scale, strict=True):
        options.setdefault(name, values)
        given = options[name]
        if given is None or len(given) != pyramid.in_chans or not all(map(math.isfinite, given)):
            expected = f"expected as many numbers as the network has channels, {pyramid.in_chans}"
            raise InputError(name, given, expected)
    if min(options["image_std"]) <= 0:
        raise InputError("image_std", options["image_std"], "expected numbers above 0")
    options.setdefault("size_divisible", max(SMALLEST_DIVISOR, pyramid.strides[-1]))
    network = (_mask_rcnn if kind == "maskrcnn" else _retinanet)(pyramid, classes + 1, options)
    check = partial(_check_call, in_chans=pyramid.in_chans, classes=classes, masks=kind == "maskrcnn")
    network.register_forward_pre_hook(check, with_kwargs=True)
    return network.train()


def _mask_rcnn(pyramid: FeaturePyramid, num_classes: int, options: dict[str, Any]) -> nn.Module:
    strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
    anchors = AnchorGenerator(tuple((ANCHOR["maskrcnn"] * stride,) for stride in strides), (RATIOS,) * len(strides))
    levels = [str(level) for level in range(len(pyramid.strides))]
    own = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
    }
    return MaskRCNN(pyramid, num_classes, **{**own, **options})


def _retinanet(pyramid: FeaturePyramid, num_classes: int, options: dict[str, Any]) -> nn.Module:
    last = pyramid.strides[-1]
    sizes = [ANCHOR["retinanet"] * stride for stride in (*pyramid.strides, 2 * last, 4 * last)]
    octaves = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in sizes)
    own = {"anchor_generator": AnchorGenerator(octaves, (RATIOS,) * len(octaves))}
    return RetinaNet(pyramid, num_classes, **{**own, **options})


Numbers = Sequence[float] | None


def _scale_of_recipe(recipe: Recipe) -> tuple[Numbers, Numbers]:
    """Return the mean and the standard deviation of each channel, of images from 0 to 1."""
    if recipe.normalize == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = recipe.mean or (0.0,), recipe.std or (1.0,)
    return tuple(values * recipe.in_chans if len(values) == 1 else values for values in (mean, std))  # type: ignore[return-value]


def _scale_of_network(network: nn.Module) -> tuple[Numbers, Numbers]:
    """Return what timm says of a network, or else ImageNet's numbers."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    return config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)


def _check_call(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_chans: int, classes: int, masks: bool
) -> None:
    """Check what a detector is called with."""
    given = dict(zip(("images", "targets"), args, strict=False)) | dict(kwargs)
    images, targets = given.get("images", ()), given.get("targets")
    for number, image in enumerate(images):
        if image.ndim != 3 or len(image) != in_chans:
            expected = f"expected ({in_chans}, height, width), the channels of the network"
            raise InputError(f"images[{number}]", tuple(image.shape), expected)
    if not network.training:
        return
    if targets is None or len(targets) != len(images):
        counted = "None" if targets is None else f"a list of {len(targets)}"
        raise InputError("targets", counted, f"expected one for each of {len(images)} images")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        check_target(image, target, classes, masks, f"targets[{number}]")


def check_target(
    image: Tensor, target: Mapping[str, Tensor], classes: int, masks: bool = False, name: str = "target"
) -> None:
    """Refuse a target that does not fit its image. A data set can call it, so that no run ends on it.

    Args:
        image: `(C, H, W)`.
        target: `"boxes"`, floats `(N, 4)`, the pixel edges x1, y1, x2, y2 with 0 <= x1 < x2 <= W and
            0 <= y1 < y2 <= H; `"labels"`, int64 `(N,)`, 1 to `classes`; and of Mask R-CNN `"masks"`, bool or uint8
            `(N, H, W)`. An image without objects has N = 0.
        classes: kinds of objects.
        masks: True expects masks.
        name: of the target, for errors.

    Raises:
        InputError: names the first entry that is wrong, such as `target["boxes"][3]`.
    """
    height, width = image.shape[-2:]
    for entry in ("boxes", "labels", "masks")[: 3 if masks else 2]:
        if not isinstance(target.get(entry), Tensor):
            kind = f"a {type(target[entry]).__name__}" if entry in target else "missing"
            raise InputError(f'{name}["{entry}"]', kind, "expected a tensor")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise InputError(f'{name}["boxes"]', _described(boxes), "expected floats (N, 4): x1, y1, x2, y2")
    if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
        raise InputError(f'{name}["labels"]', _described(labels), f"expected int64 ({len(boxes)},), one for each box")
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = boxes.new_tensor([width, height])
    inside = ((low >= 0) & (high <= sides)).all(1)
    area = (low < high).all(1)
    known = (labels >= 1) & (labels <= classes)
    if not (inside & area & known).all():
        at = int((inside & area & known).logical_not().nonzero()[0])
        if not known[at]:
            raise InputError(f'{name}["labels"][{at}]', int(labels[at]), f"expected 1 to {classes}, as classes says")
        expected = f"expected x1, y1, x2, y2 with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}"
        problem = "it has no area" if inside[at] else "it does not lie in the image"
        raise InputError(f'{name}["boxes"][{at}]', boxes[at].tolist(), f"{problem}; {expected}")
    if masks and target["masks"].shape != (len(boxes), height, width):
        expected = f"expected ({len(boxes)}, {height}, {width}), one of the size of the image for each box"
        raise InputError(f'{name}["masks"]', _described(target["masks"]), expected)


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
