"""The published FCMAE recipe (arXiv 2301.00808, appendix A.1) as data, and its arithmetic as pure functions.

A `Recipe` holds everything that decides the losses of a run, and nothing else: two runs with the same recipe on the
same images have the same losses. The output folder and the device are options of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsecnx.common.errors import InputError
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import FCMAE, SIZES, create_fcmae

PATCH_SIZE = 32
BETAS = (0.9, 0.95)
WARMUP_EPOCHS = 40
TRAINING_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the losses of a pretraining run. The constructor checks it.

    Attributes:
        model: size, a name in `sparsecnx.models.SIZES`.
        image_size: side of the square training crop, pixels; a multiple of the 32-pixel patch.
        mask_ratio: fraction of patches removed, in [0, 1); at least one patch stays and at least one goes.
        norm_pix_loss: predict pixels normalised per patch.
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

    Raises:
        InputError: a field is out of range.
    """

    model: str = "atto"
    image_size: int = 224
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

    def __post_init__(self) -> None:
        self._expect("model", self.model in SIZES, f"one of {', '.join(SIZES)}")
        self._expect("dtype", self.dtype in TRAINING_DTYPES, f"one of {', '.join(TRAINING_DTYPES)}")
        for field in ("epochs", "batch_size", "grad_accum_steps", "epoch_repeats"):
            self._expect(field, getattr(self, field) >= 1, "1 or more")
        self._expect("seed", self.seed >= 0, "0 or more")
        self._expect("base_lr", 0 < self.base_lr < math.inf, "more than 0")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        if self.clip_grad is not None:
            self._expect("clip_grad", 0 < self.clip_grad < math.inf, "more than 0")
        if self.warmup_epochs is not None:
            self._expect("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"0 to epochs, {self.epochs}")

        near = max(self.image_size // PATCH_SIZE, 1) * PATCH_SIZE
        divisible = self.image_size > 0 and self.image_size % PATCH_SIZE == 0
        multiple = f"a multiple of the patch size, {PATCH_SIZE}, such as {near} or {near + PATCH_SIZE}"
        self._expect("image_size", divisible, multiple)
        self._expect("mask_ratio", 0 <= self.mask_ratio < 1, "0 <= ratio < 1")
        patches = math.prod(self.grid)
        some = f"a ratio that masks some of the {patches} patches of a {self.image_size}-pixel image, not all"
        self._expect("mask_ratio", 0 < int(patches * (1 - self.mask_ratio)) < patches, some)

    def _expect(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(field, getattr(self, field), f"expected {expected}")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the patches down and across an image."""
        return self.image_size // PATCH_SIZE, self.image_size // PATCH_SIZE

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
        return min(WARMUP_EPOCHS, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def steps_per_epoch(self, images: int) -> int:
        """Return the optimizer steps in an epoch over `images` images, without an incomplete last batch.

        Raises:
            InputError: the effective batch is larger than an epoch.
        """
        samples = images * self.epoch_repeats
        if samples < self.effective_batch:
            accumulated = "" if self.grad_accum_steps == 1 else f" (x {self.grad_accum_steps} accumulated)"
            epoch = f"{samples} images of an epoch ({images} images x epoch_repeats {self.epoch_repeats})"
            problem = f"expected at most the {epoch}; a larger epoch_repeats shows each image more often"
            raise InputError("batch_size", f"{self.batch_size}{accumulated}", problem)
        return samples // self.effective_batch

    @classmethod
    def continued(cls, saved: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a run that goes on.

        Args:
            saved: the checkpoint's recipe as a dict.
            given: fields that the user asks for now.

        Raises:
            InputError: a field given now differs, so that the losses could not continue.
            TypeError: `saved` is not a recipe of this version.
        """
        recipe = cls(**saved)
        for field, value in given.items():
            if value != (before := getattr(recipe, field)):
                remedy = "leave it out to continue that run, or start a new one in another output folder"
                raise InputError(field, value, f"the run to resume was started with {before}; {remedy}")
        return recipe


def build_model(recipe: Recipe) -> FCMAE:
    """Build the model that a recipe trains, with weights drawn from torch's global generator."""
    return create_fcmae(recipe.model, patch_size=PATCH_SIZE, norm_pix_loss=recipe.norm_pix_loss)


def learning_rate(step: int, *, peak: float, warmup_steps: float, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear to `peak`, then half a cosine to 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's two groups: matrices and filters decay, biases and vectors do not.

    A vector has one side larger than 1, as GRN's `(1, 1, 1, C)` and the mask token's `(1, C, 1, 1)` have.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = sum(side > 1 for side in parameter.shape) <= 1
            groups[vector or name.endswith("bias")].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
