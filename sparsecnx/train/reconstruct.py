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
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from sparsecnx.common.errors import CheckpointError, InputError, MissingExtra
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.geometry.masks import random_mask
from sparsecnx.models import MPMAE
from sparsecnx.models.masked_encoder import MaskedEncoder
from sparsecnx.train import contents
from sparsecnx.train.contents import Data
from sparsecnx.train.data.address import of_checkpoint, runs_code
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.find import find_source, named_files
from sparsecnx.train.data.pictures import UnsupportedImage
from sparsecnx.train.data.scale import IMAGENET_MEAN, IMAGENET_STD, UnsupportedValues, normalize, values_in
from sparsecnx.train.data.source import Source
from sparsecnx.train.data.volumes import MAX_VOXELS, UnsupportedVolume
from sparsecnx.train.masks import without_empty
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import MAX_PIXELS, Recipe
from sparsecnx.train.targets import IMAGE

SHOWN_PHOTOGRAPHS = 6
SHOWN_VOLUMES = 2
PANEL_INCHES = 2.6


class Reconstruction(NamedTuple):
    """Images in [0, 1], each float32 `(B, 3, H, W)` or `(B, C, *spatial)` on the CPU, and the loss.

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
    channels: Sequence[int] | None = None,
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
        channels: one that is drawn in grey, or three as red, green and blue; None for the first three of images, if
            they have so many, and otherwise the first one.

    Returns:
        The loss on the masked patches of these images.

    Raises:
        InputError: the checkpoint or an image cannot be read, the ratio masks nothing or everything, or the picture
            cannot be written.
    """
    try:
        saved = contents.load(path, model)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    recipe = saved.recipe
    if not reconstructs(recipe):
        raise InputError("checkpoint", path, f"predicts {', '.join(recipe.targets or ())}: expected {IMAGE} among them")
    network: Any = build_model(recipe)
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

    source, number = _shown(saved.data, recipe) if not images else (named_files([*map(str, images)]), len(images))
    crops = Crops(source, replace(recipe, max_pixels=max_pixels, transform=None))
    inputs = torch.stack([_central(crops, place) for place in range(number)])
    valid = values_in(inputs)
    inputs = normalize(inputs, recipe)
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(number, recipe.grid, recipe.mask_ratio, generator=generator)
    mask, valid = without_empty(mask, valid, recipe.patch)
    network.eval()
    if recipe.targets is None:
        network.loss_on = "masked"  # whatever the run counted
    else:
        network.targets[IMAGE] = replace(network.targets[IMAGE], loss_on="masked")
    figure, loss = picture(network, recipe, inputs, mask, valid, saved.step, channels)
    if not math.isfinite(loss):
        raise InputError("checkpoint", path, f"its loss on these images is {loss}")
    try:
        with open_atomically(Path(out)) as (file,):
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError("out", out, f"cannot be written ({error})") from error
    return loss


def reconstructs(recipe: Recipe) -> bool:
    """Return whether a model predicts its input, and not other targets alone."""
    return recipe.targets is None or IMAGE in recipe.targets


def picture(
    model: MaskedEncoder,
    recipe: Recipe,
    images: Tensor,
    mask: Tensor,
    valid: Tensor | None,
    step: int,
    channels: Sequence[int] | None = None,
) -> tuple[Figure, float]:
    """Draw what a model in evaluation mode makes of images, and return the picture and the loss on them.

    Args:
        model: the model of `recipe` after `step` optimizer steps, on any device.
        images: `(B, C, *spatial)`, normalised as for training.
        mask: bool `(B, L)`, True = masked.
        valid: see `fill_in`.
        step: number in the title.
        channels: see `reconstruct`.
    """
    title = f"{recipe.called} {recipe.model}, step {step}, mask ratio {recipe.mask_ratio:g}"
    if recipe.photographs:
        result = fill_in(model, images, mask)
        return draw(result, title), result.loss
    colours = _colours(recipe, channels)
    result = fill_in(model, images, mask, _to_window, nan if len(colours) == 1 else 0.5, valid)
    return draw_arrays(result, title, colours), result.loss


def _shown(data: Data, recipe: Recipe) -> tuple[Source, int]:
    """Return the source that is drawn where no file is named, and of how many entries."""
    if recipe.photographs:
        source, most = find_source(None), SHOWN_PHOTOGRAPHS
    elif data.folder is None:
        raise InputError("images", "''", "expected the names of volumes")
    elif runs_code(data.folder):
        problem = f"expected names of images: those of the run come from Python code, {data.folder}"
        raise InputError("images", "''", problem)
    else:
        source = find_source(of_checkpoint(data.folder), recipe.ndim, recipe.of_images, recipe.pages, recipe.in_chans)
        most = SHOWN_PHOTOGRAPHS if recipe.ndim == 2 else SHOWN_VOLUMES
    return source, min(most, len(source))


def _colours(recipe: Recipe, chosen: Sequence[int] | None) -> Sequence[int]:
    """Return the channels that are drawn: one, or three."""
    if chosen is None:
        return (0, 1, 2) if recipe.ndim == 2 and recipe.in_chans >= 3 else (0,)
    if len(chosen) not in ((1, 3) if recipe.ndim == 2 else (1,)) or not all(0 <= c < recipe.in_chans for c in chosen):
        raise InputError("channels", tuple(chosen), f"expected one or, of images, three of 0 to {recipe.in_chans - 1}")
    return chosen


def _to_unit_range(values: Tensor, images: Tensor) -> Tensor:
    """Return normalised images as RGB in [0, 1]."""
    mean, std = (values.new_tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return (values * std + mean).clamp(0, 1)


def _to_window(values: Tensor, images: Tensor) -> Tensor:
    """Return values as grey levels in [0, 1], the range of each channel of each of `images`."""
    axes = tuple(range(2, images.ndim))
    low = images.nan_to_num(torch.inf).amin(axes, keepdim=True)
    high = images.nan_to_num(-torch.inf).amax(axes, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


@torch.no_grad()
def fill_in(
    model: MaskedEncoder,
    images: Tensor,
    mask: Tensor,
    shown: Callable[[Tensor, Tensor], Tensor] = _to_unit_range,
    hidden: float = 0.5,
    valid: Tensor | None = None,
) -> Reconstruction:
    """Predict the masked patches of images and put them into the visible ones.

    A model trained with `norm_pix_loss` predicts patches of mean 0 and variance 1. The picture gives each of them mean
    and variance of the true patch, as MAE's demonstration does: brightness and contrast are true, the content is
    predicted.

    Args:
        model: a trained masked autoencoder, or an MPMAE with a target of the name image.
        images: `(B, C, *spatial)`, normalised as for training.
        mask: bool `(B, L)`, True = masked.
        shown: brings values, the first argument, into [0, 1]; the second are the images.
        hidden: value of masked pixels in the picture of what the model sees.
        valid: bool of the shape of `images`, False where they have no value; None where they have one everywhere.
    """
    if isinstance(model, MPMAE):
        out = model(images, dict.fromkeys(model.targets) | {IMAGE: images}, mask=mask, valid=valid)
        loss, pred, mask = out.losses[IMAGE], out.predictions[IMAGE], out.mask
        target: Any = model.targets[IMAGE]
        normalised = target.norm_pix_loss
    else:
        loss, pred, mask = model(images, mask=mask, valid=valid)
        normalised = model.norm_pix_loss
    patches = model.patchify(images)
    predicted = pred.flatten(2).mT.float()
    if normalised:
        there = ~patches.isnan()
        number = there.sum(-1, keepdim=True)
        mean = patches.nansum(-1, keepdim=True) / number.clamp(min=1)
        squares = torch.where(there, patches - mean, 0).square().sum(-1, keepdim=True)
        predicted = predicted * (squares / (number - 1).clamp(min=1) + 1e-6).sqrt() + mean
    grid, masked = model.grid(images), mask.unsqueeze(-1)
    original = shown(images, images)
    grey = model.patchify(torch.full_like(images, hidden))
    masked_images = model.unpatchify(torch.where(masked, grey, model.patchify(original)), grid)
    all_predicted = shown(model.unpatchify(predicted, grid), images)
    reconstructed = shown(model.unpatchify(torch.where(masked, predicted, patches), grid), images)
    return Reconstruction(original.cpu(), masked_images.cpu(), all_predicted.cpu(), reconstructed.cpu(), loss.item())


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


def draw_arrays(result: Reconstruction, title: str, channels: Sequence[int] = (0,)) -> Figure:
    """Draw one channel of volumes, images or signals, or three of images, four panels in a row.

    In grey pictures NaN is blue: masked pixels, and those without a value. A volume has three rows, slices at right
    angles through its middle; each names the axis that it stands on.
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
            array, cut = arrays[row // len(cuts), channels[0]], cuts[row % len(cuts)]
            axis.set(xticks=[], yticks=[])
            if ndim == 1:
                axis.plot(array.numpy(), linewidth=0.7)
                axis.set_ylim(-0.05, 1.05)
                continue
            if len(channels) == 3:
                axis.imshow(arrays[row, list(channels)].nan_to_num(0).permute(1, 2, 0).numpy())
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
