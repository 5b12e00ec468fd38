"""A picture of what a masked autoencoder learned: image, visible patches, reconstruction."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.geometry.masks import random_mask
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.train import contents
from sparsecnx.train.augment import central_crop
from sparsecnx.train.data import IMAGENET_MEAN, IMAGENET_STD, normalize
from sparsecnx.train.images import UnsupportedImage, read_image, wheel_photographs
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import MAX_PIXELS, METHODS

SHOWN_PHOTOGRAPHS = 6
PANEL_INCHES = 2.6


class Reconstruction(NamedTuple):
    """Images in [0, 1], each `(B, 3, H, W)`, and the loss.

    Attributes:
        original: the input.
        masked: the input with masked patches grey.
        reconstructed: the input with masked patches as predicted.
        loss: mean squared error on the masked patches, in the unit of the training.
    """

    original: Tensor
    masked: Tensor
    reconstructed: Tensor
    loss: float


def reconstruct(
    path: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> float:
    """Draw original, masked image and reconstruction side by side, one row per image.

    Args:
        path: checkpoint of `sparsecnx pretrain`.
        images: files; if there are none, a few photographs from the wheels.
        out: picture to write; the ending chooses the format.
        mask_ratio: fraction of patches removed; None is the ratio of the pretraining.
        seed: seed of the masks.
        max_pixels: size of the largest image that is read, width x height.

    Returns:
        The loss on these images.

    Raises:
        InputError: the checkpoint or an image cannot be read, the ratio masks nothing or everything, or the picture
            cannot be written.
    """
    try:
        saved = contents.load(path)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    recipe = saved.recipe
    model = build_model(recipe)
    model.load_state_dict(saved.model)
    if mask_ratio is not None:
        recipe = replace(recipe, mask_ratio=mask_ratio)
    if not 0 <= seed < 2**63:
        raise InputError("seed", seed, "expected 0 or more, less than 2**63")
    if max_pixels < 1:
        raise InputError("max_pixels", max_pixels, "expected 1 or more")
    if os.path.exists(out) and (problem := not_regular(out)) is not None:
        raise InputError("out", out, problem)

    if not images:
        photographs = wheel_photographs()
        images = [photographs.path(i) for i in range(min(SHOWN_PHOTOGRAPHS, len(photographs.names)))]
    pixels = torch.stack([_read_centre(image, recipe.size, max_pixels) for image in images])
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(len(pixels), recipe.grid, recipe.mask_ratio, generator=generator)
    result = fill_in(model.eval(), normalize(pixels), mask)

    if not math.isfinite(result.loss):
        raise InputError("checkpoint", path, f"its loss on these images is {result.loss}")
    figure = draw(
        result, f"{METHODS[recipe.method]} {recipe.model}, step {saved.step}, mask ratio {recipe.mask_ratio:g}"
    )
    try:
        with open_atomically(Path(out)) as (file,):
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError("out", out, f"cannot be written ({error})") from error
    return result.loss


@torch.no_grad()
def fill_in(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> Reconstruction:
    """Predict the masked patches of images and put them into the visible ones.

    A model trained with `norm_pix_loss` predicts patches of mean 0 and variance 1. The picture gives each of them mean
    and variance of the true patch, as MAE's demonstration does: brightness and contrast are true, the content is
    predicted.

    Args:
        model: a trained masked autoencoder.
        images: `(B, 3, H, W)`, normalised as for training.
        mask: bool `(B, L)`, True = masked.
    """
    loss, pred, mask = model(images, mask=mask)
    target = model.patchify(images)
    predicted = pred.flatten(2).mT
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    grid, masked = model.grid(images), mask.unsqueeze(-1)
    original = _to_unit_range(images)
    grey = model.patchify(torch.full_like(images, 0.5))
    return Reconstruction(
        original,
        model.unpatchify(torch.where(masked, grey, model.patchify(original)), grid),
        _to_unit_range(model.unpatchify(torch.where(masked, predicted, target), grid)),
        loss.item(),
    )


def draw(result: Reconstruction, title: str) -> Figure:
    """Draw one row of three panels per image."""
    rows = len(result.original)
    figure = Figure(figsize=(3 * PANEL_INCHES, rows * PANEL_INCHES + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, 3, squeeze=False)
    columns = {"original": result.original, "masked": result.masked, "reconstruction": result.reconstructed}
    for column, (name, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(name)
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.axis("off")
    return figure


def _read_centre(path: str | Path, size: tuple[int, int], max_pixels: int) -> Tensor:
    """Return the centre of an image file, uint8 `(3, *size)`."""
    try:
        pixels = read_image(str(path), max_pixels)
    except UnsupportedImage as error:
        raise InputError("images", path, str(error)) from error
    except Exception as error:  # decoders raise many kinds of errors
        raise InputError("images", path, f"cannot be read ({type(error).__name__}: {error})") from error
    return central_crop(pixels, size)


def _to_unit_range(images: Tensor) -> Tensor:
    """Return normalised images as RGB in [0, 1]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean).clamp(0, 1)
