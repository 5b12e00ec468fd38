"""The published recipes as data.

That of FCMAE is in arXiv 2301.00808, appendix A.1; that of SparK in arXiv 2301.03580 and its published code.

A `Recipe` holds everything that decides the losses of a run, and nothing else: two runs with the same recipe on the
same images have the same losses. The output folder and the device are options of the loop.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES, ImageTarget
from sparsecnx.models.convnextv2 import BLOCKS, STEMS
from sparsecnx.models.mpmae import check_targets
from sparsecnx.models.patches import LOSS_ON
from sparsecnx.models.targets import PixelTarget, Target
from sparsecnx.ops.global_response_norm.groups import SCOPES
from sparsecnx.train.data.augment import SMALLEST_AREA
from sparsecnx.train.network_names import unknown_network
from sparsecnx.train.targets import IMAGE, patch_of, read_targets

LARGEST_STRIDE = 32  # of our networks; smaller patches have smaller strides
# The names of the methods, and the defaults in which they differ from FCMAE. The published SparK has a learning rate of
# 2e-4, for LAMB, and a weight decay that grows from 0.04 to 0.2.
METHODS = {"fcmae": "FCMAE", "spark": "SparK"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "fcmae": {},
    "spark": {"epochs": 1600, "weight_decay": 0.04, "clip_grad": 5.0, "crop_area": 0.67},
}
WARMUP_EPOCHS = 40
TRAINING_DTYPES = ("float32", "bfloat16")
NORMALIZATIONS = ("imagenet", "dataset", "zscore", "percentiles", "none")
PAGES = ("channels", "images")
BELOW_TILE = ("raise", "dense")
# Reading and cropping an image takes up to 12 bytes per pixel for a moment: 0.8 GB at this size.
MAX_PIXELS = 64_000_000
MANY = 1_000_000_000
MOST_VALUES = 2**20  # of a patch, its channels included: FCMAE has 512 weights for each of them
SMALL_EPOCH = 440  # images that an epoch of a small data set shows at least
# These are the types of a recipe's fields: what is accepted, and its name in an error.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "int | tuple[int, ...]": ((int, tuple), "a whole number, or"),
    "tuple[float, ...]": ((tuple,), "numbers, such as (0.5, 0.25)"),
    "tuple[float, float]": ((tuple,), "two numbers, such as (0, 10000)"),
    "dict[str, dict[str, Any]]": ((dict,), "targets by name, each with a type: JSON, or targets: in a --config"),
}
# These are options of our own networks alone.
OWN = ("grn_scope", "block", "stem_type", "norm_eps", "grn_eps", "dwconv_bias")
INTERNAL = {"first_epoch"}  # fields that a run sets itself
NUMBERS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the losses of a pretraining run. The constructor checks it.

    Attributes:
        model: size, a name in `sparsecnx.models.SIZES`; `timm:` and the name of a network of timm; or
            `module:factory`, a Python function that returns a network.
        method: `"fcmae"` or `"spark"`.
        image_size: side of the square or cubic training crop, or its side on each axis, such as 192x320, pixels;
            multiples of the patch. Volumes: 96.
        mask_ratio: fraction of patches removed, in [0, 1); at least one patch stays and at least one goes. Volumes:
            0.75.
        masks: an array of masks in a .npy file, `(N, patches)` or `(N, *grid)`, 1 = masked, one of which is drawn for
            each image; or `module:function`, a Python function of images `(B, C, *size)` and a torch.Generator that
            returns masks `(B, patches)`. None draws random masks of `mask_ratio`.
        norm_pix_loss: predict pixels normalised per patch; of targets the image, unless its own norm_pix_loss differs.
        targets: what the decoders predict, by name (letters, digits, spaces, _ and -), each with a type, image,
            class_map, regression or classification, and the arguments of its class in `sparsecnx.models`, such as
            `{biome: {type: classification, classes: 14}}` in YAML; one of the name image is the input. None
            reconstructs the image alone.
        uncertainty: learn the weights of the losses of several targets, see `sparsecnx.models.MPMAE`.
        epochs: passes over the images, warm-up included.
        batch_size: images per forward pass.
        grad_accum_steps: forward passes per optimizer step.
        base_lr: learning rate per 256 images of effective batch.
        weight_decay: weight decay of AdamW, on matrices and filters.
        warmup_epochs: linear warm-up; None is the published 40, at most a tenth of `epochs`.
        clip_grad: largest gradient norm; None does not clip, as published.
        dtype: float32, or bfloat16 for autocast (parameters and loss stay float32).
        seed: seed of the initial weights, the order of images, crops, flips and masks.
        epoch_repeats: times an epoch shows each image; for small data sets.
        crop_area: smallest part of an image's area that a crop shows, which is resized; None cuts out boxes of
            `image_size`, which are not.
        max_pixels: size of the largest image that is read, width x height; of volumes the largest compressed one.
        grn_scope: groups of GRN in the encoder, `"sample"` as in the paper and the published JAX code, or `"batch"` as
            in the published sparse PyTorch code; of our own networks alone.
        first_epoch: epoch in which the learning rate begins its schedule: 0, or the end of the run that was extended.
        patch_size: side of a patch, or its side on each axis, such as 16x32x32, pixels. Volumes: 16.
        ndim: spatial dimensions of the data, 1 to 3.
        in_chans: channels of the data; those that the files have, of photographs 3. These become grey with 1, grey and
            alpha with 2, RGB with 3, RGB and alpha with 4.
        normalize: `"imagenet"` for photographs; `"dataset"`, by `value_range`, `mean` and `std`, for other images. Per
            image or volume and channel: `"zscore"`, mean 0 and variance 1, for volumes; `"percentiles"`, the
            percentiles 0.5 and 99.5 become 0 and 1, and values beyond are clipped; `"none"`.
        value_range: with `"dataset"` the values that become 0 and 1. Those beyond are refused. Of 8 bits it is 0 to
            255, of 16 bits 0 to 65535; None leaves the units of the files.
        mean: with `"dataset"` what is subtracted then, one number or one for each channel; measured on up to 256 files.
        std: with `"dataset"` what it is divided by then, one number or one for each channel; measured likewise.
        nodata: value of pixels or voxels that have none, beside NaN and what a GeoTIFF says. They are 0 in the input
            and not in the loss.
        pages: what several pages of a TIFF are, `"channels"` or `"images"`; None refuses them.
        below_tile: `"dense"` lets the stride of the network exceed the patch, see `SparK`; of SparK alone.
        decoder_dim: channels of the decoder; None is the published number, 512 for FCMAE and 768 for SparK.
        decoder_depth: blocks of the decoder; None is the published number, 1; of FCMAE alone.
        loss_on: the patches that the loss counts, `"masked"`, `"all"` or `"visible"`.
        block: `"v2"`, or `"v1"` for the block of the first ConvNeXt, without GRN; of our own networks alone.
        stem_type: `"patchify"` as published, or `"conv3x3"`, a convolution of every pixel before the strided one; of
            our own networks alone.
        norm_eps: epsilon of LayerNorm; of our own networks alone.
        grn_eps: epsilon of GRN; of our own networks with blocks v2 alone.
        dwconv_bias: biases of the depthwise convolutions of the blocks; of our own networks alone.
        ema_decay: decay of a moving average of the weights, such as 0.9999, that is kept beside the network, as a
            teacher of other methods, and in the checkpoints; None keeps none.
        transform: `module:function`, a Python function that takes and returns a crop; None for none.

    Raises:
        InputError: a field is out of range or of another type.
    """

    model: str = "atto"
    method: str = "fcmae"
    image_size: int | tuple[int, ...] = 224
    mask_ratio: float = 0.6
    norm_pix_loss: bool = True
    epochs: int = 800
    batch_size: int = 64
    grad_accum_steps: int = 1
    base_lr: float = 1.5e-4
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    clip_grad: float | None = None
    dtype: str = "float32"
    seed: int = 0
    epoch_repeats: int = 1
    crop_area: float | None = SMALLEST_AREA
    max_pixels: int = MAX_PIXELS
    grn_scope: str = "sample"
    first_epoch: int = 0
    patch_size: int | tuple[int, ...] = 32
    ndim: int = 2
    in_chans: int = 3
    normalize: str = "imagenet"
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    nodata: float | None = None
    pages: str | None = None
    below_tile: str = "raise"
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    loss_on: str = "masked"
    block: str = "v2"
    stem_type: str = "patchify"
    norm_eps: float = 1e-6
    grn_eps: float = 1e-6
    dwconv_bias: bool = True
    transform: str | None = None
    masks: str | None = None
    ema_decay: float | None = None
    targets: dict[str, dict[str, Any]] | None = None
    uncertainty: bool = False

    def __post_init__(self) -> None:
        self._expect_types()
        for field in ("image_size", "patch_size"):  # 64x64 is 64
            object.__setattr__(self, field, _shortest(getattr(self, field)))
        self._expect_data()
        self._expect("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        if (problem := unknown_network(self.model)) is not None:
            raise InputError("model", _typed(self.model), problem)
        self._expect_network()
        self._expect("dtype", self.dtype in TRAINING_DTYPES, f"one of {', '.join(TRAINING_DTYPES)}")
        for field in ("epochs", "batch_size", "grad_accum_steps", "epoch_repeats", "max_pixels"):
            self._expect(field, 1 <= getattr(self, field) <= MANY, f"1 or more, at most {MANY}")
        self._expect("seed", 0 <= self.seed < 2**63, "0 or more, less than 2**63")
        if self.crop_area is not None:
            self._expect("crop_area", self.ndim == 2, "none, since crops of volumes and signals are not resized")
            self._expect("crop_area", 0 < self.crop_area <= 1, "more than 0, at most 1")
        self._expect("base_lr", 0 < self.base_lr <= MANY, f"more than 0, at most {MANY}")
        self._expect("weight_decay", 0 <= self.weight_decay <= MANY, f"0 or more, at most {MANY}")
        if self.clip_grad is not None:
            self._expect("clip_grad", 0 < self.clip_grad <= MANY, f"more than 0, at most {MANY}")
        if self.ema_decay is not None:
            self._expect("ema_decay", 0 < self.ema_decay < 1, "more than 0, less than 1")
        if self.decoder_dim is not None:
            self._expect("decoder_dim", 1 <= self.decoder_dim <= 2**16, f"1 to {2**16}")
        if self.decoder_depth is not None:
            self._expect("decoder_depth", self.method == "fcmae", f"none, since {self.method} has a decoder of its own")
            self._expect("decoder_depth", 1 <= self.decoder_depth <= 2**8, f"1 to {2**8}")
        self._expect("loss_on", self.loss_on in LOSS_ON, f"one of {', '.join(LOSS_ON)}")
        if self.warmup_epochs is not None:
            self._expect("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"0 to epochs, {self.epochs}")
        self._expect("first_epoch", 0 <= self.first_epoch < self.epochs, f"0 to {self.epochs - 1}")

        if self.transform is not None:
            self._expect("transform", ":" in self.transform, "module:function")
        self._expect("below_tile", self.below_tile in BELOW_TILE, f"one of {', '.join(BELOW_TILE)}")
        spark = self.below_tile == "raise" or self.method == "spark"
        self._expect("below_tile", spark, f"raise, since {self.method} takes the map of the largest stride alone")
        for patch in self.patch:
            own = self.model not in SIZES or patch % LARGEST_STRIDE == 0 or patch in (1, 2, 4, 8, 16)
            expected = f"1, 2, 4, 8, 16 or a multiple of {LARGEST_STRIDE} on every axis for {self.model}"
            self._expect("patch_size", patch > 0 and own, expected)
        values = f"at most {MOST_VALUES} values in a patch of {self.in_chans} channels"
        self._expect("patch_size", math.prod(self.patch) * self.in_chans <= MOST_VALUES, values)
        for side, patch in zip(self.size, self.patch, strict=True):
            near = max(side // patch, 1) * patch
            multiple = f"a multiple of the patch size, {_typed(self.patch_size)}, such as {near} or {near + patch}"
            self._expect("image_size", side > 0 and side % patch == 0, multiple)
        largest = f"at most --max-pixels, {self.max_pixels}, in a crop"
        self._expect("image_size", math.prod(self.size) <= self.max_pixels, largest)
        self._expect_masks()
        self._expect_targets()

    def _expect_masks(self) -> None:
        """Refuse a ratio that masks nothing or everything."""
        patches = math.prod(self.grid)
        self._expect("image_size", patches > 1, f"more than one patch of {' x '.join(map(str, self.patch))} pixels")
        self._expect("mask_ratio", 0 <= self.mask_ratio < 1, "0 <= ratio < 1")
        some = f"a ratio that masks some of the {patches} patches of an image of {self.pixels} pixels, not all"
        self._expect("mask_ratio", 0 < int(patches * (1 - self.mask_ratio)) < patches, some)

    def _expect_targets(self) -> None:
        """Refuse targets that do not fit the input, and options that targets have of their own."""
        if self.targets is None:
            self._expect("uncertainty", not self.uncertainty, "False, since there are no targets to weigh")
            return
        for field, reason in {
            "method": "that of targets",
            "loss_on": "since each target has its own",
            "transform": "since targets would not follow it",
        }.items():
            default = getattr(type(self), field)
            self._expect(field, getattr(self, field) == default, f"{_typed(default)}, {reason}")
        lists = {  # as YAML has them, not tuples
            name: {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            if isinstance(values, dict)
            else values
            for name, values in self.targets.items()
        }
        object.__setattr__(self, "targets", lists)
        self._expect("targets", bool(self.predicted), "one or more, or none, which reconstructs the image alone")
        for name, target in self.predicted.items():
            try:
                check_targets({name: target}, self.uncertainty)
            except (TypeError, ValueError) as error:
                raise InputError("targets", name, str(error)) from error
            if name != IMAGE and self.ndim != 2:
                raise InputError("targets", name, f"expected {IMAGE} alone, since the data are no images")
            values = target.outputs(patch_of(target, self.patch))
            if values > MOST_VALUES:
                raise InputError("targets", name, f"expected at most {MOST_VALUES} values in a patch, not {values}")
            if isinstance(target, PixelTarget) and len(patch_of(target, self.patch)) != self.ndim:
                raise InputError("targets", name, f"expected a patch_size of {NUMBERS[self.ndim]} dimensions")
            if name == IMAGE and not self._is_input(target):
                expected = f"{{type: image, channels: {self.in_chans}}} without a patch_size, the input itself"
                raise InputError("targets", name, f"expected {expected}")

    @cached_property
    def predicted(self) -> dict[str, Target]:
        """Return the targets by name; empty where the image alone is reconstructed."""
        described = dict(self.targets or {})
        if isinstance(image := described.get(IMAGE), dict) and image.get("type") == IMAGE:
            described[IMAGE] = {"norm_pix_loss": self.norm_pix_loss, **image}
        return read_targets(described)

    min_lr = 0.0  # at the end of the schedule
    unused: ClassVar[Collection[str]] = ()  # fields that are no options of a command

    @property
    def called(self) -> str:
        """Return the name of the method."""
        return METHODS[self.method] if self.targets is None else "MP-MAE"

    def _is_input(self, target: Target) -> bool:
        return isinstance(target, ImageTarget) and target.channels == self.in_chans and target.patch_size is None

    def _expect_network(self) -> None:
        """Refuse options of our own networks that are none, or that a network or its blocks do not have."""
        for field, choices in {"grn_scope": SCOPES, "block": BLOCKS, "stem_type": STEMS}.items():
            self._expect(field, getattr(self, field) in choices, f"one of {', '.join(choices)}")
        for field in ("norm_eps", "grn_eps"):
            self._expect(field, 0 < getattr(self, field) <= 1, "more than 0, at most 1")
        for field in OWN:
            default = getattr(type(self), field)
            same, wanted = getattr(self, field) == default, _typed(default)
            self._expect(field, same or self.model in SIZES, f"{wanted}, since {self.model} is no network of sparsecnx")
            if field in ("grn_scope", "grn_eps"):
                self._expect(field, same or self.block == "v2", f"{wanted}, since blocks {self.block} have no GRN")

    def _expect_data(self) -> None:
        """Refuse what does not fit together in the fields that say what the data are."""
        self._expect("ndim", self.ndim in NUMBERS, "1, 2 or 3")
        self._expect("in_chans", 1 <= self.in_chans <= MANY, f"1 or more, at most {MANY}")
        self._expect("normalize", self.normalize in NORMALIZATIONS, f"one of {', '.join(NORMALIZATIONS)}")
        others = (self.ndim, self.in_chans) == (2, 3) or self.normalize != "imagenet"
        self._expect("normalize", others, f"one of {', '.join(NORMALIZATIONS[1:])}, since the data are no photographs")
        self._expect("pages", self.pages in (None, *PAGES), f"one of {', '.join(PAGES)}")
        if self.nodata is not None:
            self._expect("nodata", type(self.nodata) is float or _is_short(self.nodata), "a finite number")
            self._expect("nodata", math.isfinite(self.nodata), "a finite number")
        if self.normalize != "dataset":
            for field in ("value_range", "mean", "std"):
                self._expect(field, getattr(self, field) is None, f"none, since normalize is {self.normalize}")
            return
        for field in ("mean", "std"):
            values = getattr(self, field) or ()
            fits = len(values) in (1, self.in_chans) and all(map(math.isfinite, values))
            self._expect(field, fits, f"one finite number, or one for each of {self.in_chans} channels")
        self._expect("std", min(self.std or (0,)) > 0, "more than 0")
        if self.value_range is not None:
            ordered = len(self.value_range) == 2 and -math.inf < self.value_range[0] < self.value_range[1] < math.inf
            self._expect("value_range", ordered, "two finite numbers, the lower one first")
            low, high = self.value_range
            within = all(0 <= value <= 1 for value in self.mean or ())
            remedy = "where value_range is none, it is in the units of the files"
            self._expect("mean", within, f"0 to 1, the share of the value range from {low:g} to {high:g}; {remedy}")

    def _expect_types(self) -> None:
        """Refuse what Python would compute with for a while, such as a `batch_size` of 2.5 or of True."""
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith(" | None"):
                continue
            classes, name = KINDS[kind.removesuffix(" | None")]
            parts = value if isinstance(value, tuple) else (value,)
            if classes == (tuple,) and all(type(part) is float or _is_short(part) for part in parts):
                value = tuple(map(float, parts))  # one number is one for all channels
                object.__setattr__(self, field.name, value)
                continue
            whole = tuple not in classes or all(type(part) is int for part in parts)
            if tuple in classes:
                axes = self.ndim if isinstance(self.ndim, int) and self.ndim in NUMBERS else 2
                name, whole = (
                    f"{name} {NUMBERS[axes]}, the dimensions of the data",
                    whole and (parts[0:1] == (value,) or len(parts) == axes),
                )
            if not isinstance(value, classes) or (isinstance(value, bool) and kind != "bool") or not whole:
                raise InputError(field.name, shown(value), f"expected {name}")

    def _expect(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(field, _typed(getattr(self, field)), f"expected {expected}")

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the patches of an image on each axis."""
        return tuple(side // patch for side, patch in zip(self.size, self.patch, strict=True))

    @property
    def size(self) -> tuple[int, ...]:
        """Return the side of the training crop on each axis."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * self.ndim

    @property
    def patch(self) -> tuple[int, ...]:
        """Return the side of a patch on each axis."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,) * self.ndim

    @property
    def photographs(self) -> bool:
        """Return whether the data are images, and not arrays of any channels and dimensions."""
        return self.normalize == "imagenet"

    @property
    def of_images(self) -> bool | None:
        """Return True for image files alone, False for arrays alone; None where both are possible."""
        if self.photographs:
            return True
        return None if self.ndim == 2 else False

    @property
    def pixels(self) -> str:
        """Return the size of the training crop in words: `224` or `192x320`."""
        return _typed(self.image_size)

    @property
    def visible(self) -> int:
        """Return the patches of an image that stay visible."""
        return visible_count(math.prod(self.grid), self.mask_ratio)

    @property
    def effective_batch(self) -> int:
        """Return the images per optimizer step."""
        return self.batch_size * self.grad_accum_steps

    @property
    def peak_lr(self) -> float:
        """Return the learning rate at the end of warm-up: `base_lr` x effective batch / 256."""
        return self.base_lr * self.effective_batch / 256

    @property
    def warmup(self) -> float:
        """Return the epochs of warm-up: by default the published 40, but at most a tenth of the run."""
        most = (self.epochs - self.first_epoch) / 10
        return min(WARMUP_EPOCHS, most) if self.warmup_epochs is None else self.warmup_epochs

    def steps_per_epoch(self, images: int) -> int:
        """Return the optimizer steps in an epoch over `images` images, without an incomplete last batch.

        Raises:
            InputError: the effective batch is larger than an epoch.
        """
        samples = images * self.epoch_repeats
        if samples < self.effective_batch:
            accumulated = "" if self.grad_accum_steps == 1 else f" (x {self.grad_accum_steps} accumulated)"
            epoch = f"{samples} images of an epoch ({images} images x --epoch-repeats {self.epoch_repeats})"
            remedy = "a larger --epoch-repeats shows each image more often, --small-data sets both for few images"
            problem = f"expected at most the {epoch}; {remedy}"
            raise InputError("batch_size", f"{self.batch_size}{accumulated}", problem)
        return samples // self.effective_batch

    def refuse_change(self, given: Mapping[str, Any]) -> None:
        """Raise InputError if a field that the user gives to a resumed run differs: the losses could not continue."""
        for field, value in given.items():
            stored = (float(value),) if field in ("mean", "std") and isinstance(value, (int, float)) else value
            if _shortest(stored) != _shortest(before := getattr(self, field)):
                remedy = "leave it out to continue that run, or start a new one in another output folder"
                raise InputError(field, _typed(value), f"the run to resume has {_typed(before)}; {remedy}")


def small_data(images: int) -> dict[str, Any]:
    """Return the fields of a recipe for a few hundred images or fewer.

    The published learning rate is for batches of thousands, and would hardly move the weights here.
    """
    repeats = max(1, math.ceil(SMALL_EPOCH / images))
    return {"batch_size": 8, "base_lr": 0.03, "epochs": 100, "epoch_repeats": repeats}


def _is_short(value: Any) -> bool:
    """Return whether a value is a whole number that floating-point numbers reach."""
    return type(value) is int and value.bit_length() < 64


def _shortest(value: Any) -> Any:
    """Return one number for equal sides: 64 for (64, 64)."""
    return value[0] if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1 else value


def _typed(value: Any) -> str:
    """Return the value of a field as one types it on the command line."""
    if isinstance(value, tuple) and all(type(part) is int for part in value):
        return "x".join(map(str, value))
    return value if isinstance(value, str) else shown(value)


def shown(value: Any) -> str:
    """Return any value in a few words on one line, for an error."""
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided else f" as {str(value.layout).removeprefix('torch.')}"
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{kind}{place}"
    if isinstance(value, int) and value.bit_length() > 100:  # Python refuses to print very long ones
        return f"a whole number of {value.bit_length()} bits"
    return " ".join(reprlib.repr(value).split())
