"""Define what a multi-pretext masked autoencoder predicts: images, maps of classes, and labels of images.

Each target knows the shape of its values, and its error: a sum, and the number of patches or images that it is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecnx.models.patches import check_loss_on, counted_patches, patchify, squared_errors
from sparsecnx.models.pretrained import register

IGNORED = -100  # as in torch's cross entropy


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that is predicted from an image.

    Attributes:
        weight: factor of its loss in the total one.
    """

    weight: float = 1.0

    @property
    def no_value(self) -> float:
        """Return what stands where there is no value: a float, of a target of floats, or a whole number."""
        return math.nan

    def shape(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the value of one image.

        Args:
            sides: of its map in this target.
        """
        raise NotImplementedError

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if not abstract:
            register(cls)

    def __post_init__(self) -> None:
        _expect("weight", self.weight, 0 < self.weight < math.inf, "more than 0")

    def outputs(self, patch: tuple[int, ...]) -> int:
        """Return the number of predicted values, of each patch or of each image."""
        raise NotImplementedError

    def check(self, name: str, value: Tensor, sizes: tuple[int, ...]) -> None:
        """Raise TypeError or ValueError unless `value` has the type and shape of this target, and classes that exist.

        Classes are read on the CPU only, and not in compiled code.

        Args:
            name: what errors call it.
            value: the values of a batch.
            sizes: images of the batch, and the sides of an image of this target.
        """
        _check(name, value, (sizes[0], *self.shape(sizes[1:])), isinstance(self.no_value, float))

    def summed_error(self, value: Tensor, pred: Tensor, mask: Tensor, patch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the sum of the errors, and the number of patches or images that have one.

        Args:
            value: see `check`.
            pred: `(B, outputs, *grid)`, or `(B, outputs)` of labels.
            mask: bool `(B, L)`, True = masked.
            patch: pixels per patch along each axis.
        """
        counted = self.counted(value, mask, patch)
        return (self.errors(value, pred, patch) * counted).sum(), counted.sum()

    def counted(self, value: Tensor, mask: Tensor, patch: tuple[int, ...]) -> Tensor:
        """Return which patches `(B, L)`, or images `(B,)`, have an error that counts, bool, see `summed_error`."""
        raise NotImplementedError

    def errors(self, value: Tensor, pred: Tensor, patch: tuple[int, ...]) -> Tensor:
        """Return the error of every patch `(B, L)`, or image `(B,)`, 0 where it has no value, see `summed_error`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PixelTarget(Target, abstract=True):
    """A target with a value at each pixel, predicted patch by patch. It has the grid of patches of the input.

    Attributes:
        patch_size: pixels per patch side in this target, one number or one for each axis; None is that of the input. An
            image of half the resolution has patches of half the side.
        loss_on: the patches that the loss counts, `"masked"`, `"all"` or `"visible"`.
    """

    patch_size: int | tuple[int, ...] | None = None
    loss_on: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss_on(self.loss_on)

    def counted(self, value: Tensor, mask: Tensor, patch: tuple[int, ...]) -> Tensor:
        return counted_patches(mask, self.loss_on, self.there(value, patch))

    def there(self, value: Tensor, patch: tuple[int, ...]) -> Tensor:
        """Return which values of each patch exist, bool `(B, L, K)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageTarget(PixelTarget):
    """An image of continuous values `(B, channels, *spatial)`. NaN and infinities are no values.

    The error of a patch is the mean squared error of its values.

    Attributes:
        channels: channels of the image.
        norm_pix_loss: True normalises the values of every patch to zero mean and unit variance.
    """

    channels: int
    norm_pix_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("channels", self.channels, self.channels >= 1, "1 or more")

    def outputs(self, patch: tuple[int, ...]) -> int:
        return math.prod(patch) * self.channels

    def shape(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return (self.channels, *sides)

    def there(self, value: Tensor, patch: tuple[int, ...]) -> Tensor:
        return patchify(value.isfinite(), patch)

    def errors(self, value: Tensor, pred: Tensor, patch: tuple[int, ...]) -> Tensor:
        target = patchify(_finite(value), patch)
        return squared_errors(pred.flatten(2).mT.to(target.dtype), target, self.there(value, patch), self.norm_pix_loss)


@dataclass(frozen=True)
class ClassMapTarget(PixelTarget):
    """A map of classes `(B, *spatial)`, whole numbers, such as land cover.

    The error of a patch is the mean cross entropy of its pixels.

    Attributes:
        classes: number of classes.
        ignore_index: the number of pixels without a class.
    """

    classes: int
    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("classes", self.classes, self.classes >= 2, "2 or more")
        _expect("ignore_index", self.ignore_index, -(2**63) <= self.ignore_index < 2**63, "a number of 64 bits")

    def outputs(self, patch: tuple[int, ...]) -> int:
        return math.prod(patch) * self.classes

    @property
    def no_value(self) -> int:
        return self.ignore_index

    def shape(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return sides

    def check(self, name: str, value: Tensor, sizes: tuple[int, ...]) -> None:
        super().check(name, value, sizes)
        _check_classes(name, value, self.classes, self.ignore_index)

    def there(self, value: Tensor, patch: tuple[int, ...]) -> Tensor:
        return patchify(value[:, None].long(), patch) != self.ignore_index

    def errors(self, value: Tensor, pred: Tensor, patch: tuple[int, ...]) -> Tensor:
        scores = pred.flatten(2).mT.unflatten(2, (-1, self.classes))  # (B, L, pixels, classes)
        error = _cross_entropy(scores, patchify(value[:, None].long(), patch), self.ignore_index)
        return error.sum(dim=-1) / self.there(value, patch).sum(dim=-1).clamp(min=1)


@dataclass(frozen=True)
class RegressionTarget(Target):
    """Continuous labels of an image, `(B, values)`, such as its place or the weather. NaN and infinities are no values.

    The error of an image is the mean squared error of its values.

    Attributes:
        values: number of values.
    """

    values: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("values", self.values, self.values >= 1, "1 or more")

    def outputs(self, patch: tuple[int, ...]) -> int:
        return self.values

    def shape(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return (self.values,)

    def counted(self, value: Tensor, mask: Tensor, patch: tuple[int, ...]) -> Tensor:
        return value.isfinite().any(dim=-1)

    def errors(self, value: Tensor, pred: Tensor, patch: tuple[int, ...]) -> Tensor:
        target = _finite(value)
        return squared_errors(pred.to(target.dtype), target, value.isfinite(), False)


@dataclass(frozen=True)
class ClassificationTarget(Target):
    """The class of an image, `(B,)`, a whole number. The error of an image is its cross entropy.

    Attributes:
        classes: number of classes.
        ignore_index: the number of images without a class.
    """

    classes: int
    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("classes", self.classes, self.classes >= 2, "2 or more")
        _expect("ignore_index", self.ignore_index, -(2**63) <= self.ignore_index < 2**63, "a number of 64 bits")

    def outputs(self, patch: tuple[int, ...]) -> int:
        return self.classes

    @property
    def no_value(self) -> int:
        return self.ignore_index

    def shape(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def check(self, name: str, value: Tensor, sizes: tuple[int, ...]) -> None:
        super().check(name, value, sizes)
        _check_classes(name, value, self.classes, self.ignore_index)

    def counted(self, value: Tensor, mask: Tensor, patch: tuple[int, ...]) -> Tensor:
        return value.long() != self.ignore_index  # A uint8 would compare equal to an ignore_index modulo 256.

    def errors(self, value: Tensor, pred: Tensor, patch: tuple[int, ...]) -> Tensor:
        return _cross_entropy(pred, value.long(), self.ignore_index)


def _expect(argument: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{argument} is {value}: expected {expected}")


def _check(name: str, value: Tensor, shape: tuple[int, ...], floating: bool) -> None:
    kind = "a floating tensor" if floating else "a tensor of whole numbers"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected {kind} {shape}")
    if value.is_floating_point() != floating or value.dtype == torch.bool:
        raise TypeError(f"{name} is {value.dtype}: expected {kind} {shape}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} is {tuple(value.shape)}: expected {shape}")


def _check_classes(name: str, value: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a class that is not there. Only values on the CPU are read, which costs no waiting."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    value = value.long()
    wrong = value[((value < 0) | (value >= classes)) & (value != ignore_index)]
    if wrong.numel():
        raise ValueError(f"{name} has the value {wrong[0]}: expected 0 to {classes - 1}, or {ignore_index} for none")


def _finite(value: Tensor) -> Tensor:
    """Return values in float32 or wider, 0 where they are NaN or infinite."""
    return value.masked_fill(~value.isfinite(), 0).to(torch.promote_types(value.dtype, torch.float32))


def _cross_entropy(scores: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Return the cross entropy of `scores (..., classes)` for `classes (...)`, 0 where they are to be ignored."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, -2)
    error = F.cross_entropy(scores, classes.flatten(), ignore_index=ignore_index, reduction="none")
    return error.view(classes.shape)
