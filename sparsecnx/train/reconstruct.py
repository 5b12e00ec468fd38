"""A picture of what a masked autoencoder learned: image, visible patches, reconstruction.

Of a volume it shows three slices at right angles, through the middle of the crop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from sparsecnx.common.errors import CheckpointError, InputError, MissingExtra
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.geometry.masks import random_mask
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.train import contents
from sparsecnx.train.contents import Data
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.files import FileSet
from sparsecnx.train.data.find import find_data, named_files
from sparsecnx.train.data.images import UnsupportedImage, wheel_photographs
from sparsecnx.train.data.scale import IMAGENET_MEAN, IMAGENET_STD, UnsupportedValues, normalize
from sparsecnx.train.data.volumes import MAX_VOXELS, UnsupportedVolume
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import MAX_PIXELS, METHODS, Recipe

SHOWN_PHOTOGRAPHS = 6
SHOWN_VOLUMES = 2
PANEL_INCHES = 2.6


class Reconstruction(NamedTuple):
    """Images in [0, 1], each `(B, 3, H, W)` or `(B, C, *spatial)`, and the loss.

    Attributes:
        original: the input.
        masked: the input with masked patches grey.
        predicted: all patches as predicted, the visible ones too, which the loss does not count.
        reconstructed: the input with masked patches as predicted.
        loss: mean squared error on the masked patches, in the unit of the training.
    """

    original: Tensor
    masked: Tensor
    predicted: Tensor
    reconstructed: Tensor
    loss: float


def reconstruct(
    path: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    max_pixels: int | None = None,
    model: str | None = None,
) -> float:
    """Draw original, masked image and reconstruction side by side, one row per image, three rows per volume.

    Args:
        path: checkpoint of `sparsecnx pretrain`.
        images: files; if there are none, a few photographs from the wheels, or of a run on volumes the first of these.
        out: picture to write; the ending chooses the format.
        mask_ratio: fraction of patches removed; None is the ratio of the pretraining.
        seed: seed of the masks.
        max_pixels: size of the largest image that is read, width x height, or of the largest compressed volume; None
            is 64 million, of volumes a thousand million.
        model: `module:factory` of the run, where its network was one.

    Returns:
        The loss on these images.

    Raises:
        InputError: the checkpoint or an image cannot be read, the ratio masks nothing or everything, or the picture
            cannot be written.
    """
    try:
        saved = contents.load(path, model)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    recipe = saved.recipe
    network = build_model(recipe)
    network.load_state_dict(saved.model)
    if mask_ratio is not None:
        recipe = replace(recipe, mask_ratio=mask_ratio)
    if not 0 <= seed < 2**63:
        raise InputError("seed", seed, "expected 0 or more, less than 2**63")
    if max_pixels is None:
        max_pixels = MAX_PIXELS if recipe.photographs else MAX_VOXELS
    if max_pixels < (least := math.prod(recipe.size)):
        raise InputError("max_pixels", max_pixels, f"expected {least} or more, the pixels of a crop")
    if os.path.exists(out) and (problem := not_regular(out)) is not None:
        raise InputError("out", out, problem)

    files = [str(image) for image in images] or _shown(saved.data, recipe)
    crops = Crops(named_files(files, recipe.photographs), replace(recipe, max_pixels=max_pixels, transform=None))
    inputs = normalize(torch.stack([_central(crops, place) for place in range(len(files))]))
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(len(inputs), recipe.grid, recipe.mask_ratio, generator=generator)
    network.eval()
    result = fill_in(network, inputs, mask) if recipe.photographs else fill_in(network, inputs, mask, _to_window, nan)

    if not math.isfinite(result.loss):
        raise InputError("checkpoint", path, f"its loss on these images is {result.loss}")
    title = f"{METHODS[recipe.method]} {recipe.model}, step {saved.step}, mask ratio {recipe.mask_ratio:g}"
    figure = draw(result, title) if recipe.photographs else draw_arrays(result, title)
    try:
        with open_atomically(Path(out)) as (file,):
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError("out", out, f"cannot be written ({error})") from error
    return result.loss


def _shown(data: Data, recipe: Recipe) -> list[str]:
    """Return the files that are drawn where none is named."""
    if recipe.photographs:
        files: FileSet = wheel_photographs()
        number = SHOWN_PHOTOGRAPHS
    elif data.folder is None:
        raise InputError("images", "''", "expected the names of volumes")
    else:
        files, number = find_data(data.folder, recipe.ndim, False), SHOWN_VOLUMES
    return [files.path(i) for i in range(min(number, len(files)))]


def _to_unit_range(values: Tensor, images: Tensor) -> Tensor:
    """Return normalised images as RGB in [0, 1]."""
    mean, std = (values.new_tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return (values * std + mean).clamp(0, 1)


def _to_window(values: Tensor, images: Tensor) -> Tensor:
    """Return values as grey levels in [0, 1], the range of each channel of each of `images`."""
    axes = tuple(range(2, images.ndim))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


@torch.no_grad()
def fill_in(
    model: MaskedAutoencoder,
    images: Tensor,
    mask: Tensor,
    shown: Callable[[Tensor, Tensor], Tensor] = _to_unit_range,
    hidden: float = 0.5,
) -> Reconstruction:
    """Predict the masked patches of images and put them into the visible ones.

    A model trained with `norm_pix_loss` predicts patches of mean 0 and variance 1. The picture gives each of them mean
    and variance of the true patch, as MAE's demonstration does: brightness and contrast are true, the content is
    predicted.

    Args:
        model: a trained masked autoencoder.
        images: `(B, C, *spatial)`, normalised as for training.
        mask: bool `(B, L)`, True = masked.
        shown: brings values, the first argument, into [0, 1]; the second are the images.
        hidden: value of masked pixels in the picture of what the model sees.
    """
    loss, pred, mask = model(images, mask=mask)
    target = model.patchify(images)
    predicted = pred.flatten(2).mT
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    grid, masked = model.grid(images), mask.unsqueeze(-1)
    original = shown(images, images)
    grey = model.patchify(torch.full_like(images, hidden))
    return Reconstruction(
        original,
        model.unpatchify(torch.where(masked, grey, model.patchify(original)), grid),
        shown(model.unpatchify(predicted, grid), images),
        shown(model.unpatchify(torch.where(masked, predicted, target), grid), images),
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


def draw_arrays(result: Reconstruction, title: str) -> Figure:
    """Draw the first channel of volumes, images or signals, four panels in a row. Masked pixels, NaN, are blue.

    A volume has three rows, slices at right angles through its middle; each names the axis that it stands on.
    """
    columns = {
        "original": result.original,
        "masked": result.masked,
        "predicted": result.predicted,
        "visible and predicted": result.reconstructed,
    }
    ndim, count = result.original.ndim - 2, len(result.original)
    cuts: list[int | None] = [0, 1, 2] if ndim == 3 else [None]
    rows, colors = count * len(cuts), colormaps["gray"].with_extremes(bad="tab:blue")
    figure = Figure(figsize=(4 * PANEL_INCHES, rows * PANEL_INCHES + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, 4, squeeze=False)
    for column, (name, arrays) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(name)
        for row, axis in enumerate(column):
            array, cut = arrays[row // len(cuts), 0], cuts[row % len(cuts)]
            axis.set(xticks=[], yticks=[])
            if ndim == 1:
                axis.plot(array.numpy(), linewidth=0.7)
                axis.set_ylim(-0.05, 1.05)
                continue
            shown = array if cut is None else array.select(cut, array.shape[cut] // 2)
            axis.imshow(shown.numpy(), cmap=colors, vmin=0, vmax=1)
            if cut is not None:
                axes[row, 0].set_ylabel(f"across axis {cut}")
    return figure


def _central(crops: Crops, place: int) -> Tensor:
    """Return the centre of an image or a volume."""
    path = crops.source.name(place)
    try:
        return crops.central(place)
    except (UnsupportedImage, UnsupportedVolume, UnsupportedValues) as error:
        raise InputError("images", path, str(error)) from error
    except MissingExtra:
        raise
    except Exception as error:  # libraries raise many kinds of errors
        raise InputError("images", path, f"cannot be read ({type(error).__name__}: {error})") from error
