"""Frozen features: what a network, pretrained or not, or the pixels alone say of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.compat.checkpoints import load_encoder
from sparsecnx.models import SIZES, ConvNeXtV2Encoder
from sparsecnx.models.encoders import stages_of
from sparsecnx.train import checkpoint, contents
from sparsecnx.train.contents import PRETRAINING, Contents
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.loader import leave_signals_to_parent
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.networks import encoder_options, foreign_encoder
from sparsecnx.train.recipe import Recipe
from sparsecnx.transfer.classifier import FINETUNING
from sparsecnx.transfer.labels import Labelled
from sparsecnx.transfer.recipe import TAKEN

PIXELS = 32  # sides that images are shrunk to where their pixels are the features
BATCH = 64


class Pretrained(NamedTuple):
    """Hold the network of a checkpoint.

    Attributes:
        name: what tables call it.
        encoder: in evaluation mode.
        recipe: of the pretraining; it says how images are read and normalised.
    """

    name: str
    encoder: nn.Module
    recipe: Recipe


def load_pretrained(path: str | Path, model: str | None = None, image_size: Any = None) -> Pretrained:
    """Return the network of a checkpoint, of a run or of weights alone.

    Args:
        path: a checkpoint of `sparsecnx pretrain` or `finetune`, or a file that `load_encoder` reads.
        model: for a file of weights alone its network, see `Recipe.model`; for a run its `module:factory`, if it has
            one: a file alone runs no code.
        image_size: sides of the images, see `Recipe`; None for those of the run.

    Raises:
        InputError: the file cannot be read, or does not fit the network.
    """
    sizes: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    saved = load_run(path, model)
    if saved is None:
        recipe = Recipe(model=str(model), **sizes)
        encoder = encoder_of(recipe)
    else:
        sizes |= {"image_size": saved.recipe.image_size, **sizes, "crop_area": 1.0 if saved.recipe.ndim == 2 else None}
        recipe = Recipe(**{name: getattr(saved.recipe, name) for name in (*TAKEN, "mask_ratio")}, **sizes)
        encoder = encoder_of(recipe)
    try:
        load_encoder(encoder, path)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    return Pretrained(str(path), encoder.eval(), recipe)


def load_run(path: str | Path, model: str | None) -> Contents | None:
    """Return the checkpoint of a run of pretraining or of fine-tuning; None for weights of the network `model`.

    Raises:
        InputError: it cannot be read, or it is no run and no network is named.
    """
    try:
        state = checkpoint.read(path)
    except CheckpointError as error:
        if model is None:
            raise InputError("checkpoint", path, f"{error}; weights that are no run need --model NAME") from error
        return None
    try:
        return contents.check(state, model, FINETUNING if "crop_pct" in state["recipe"] else PRETRAINING)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error


def encoder_of(recipe: Recipe, seed: int = 0) -> nn.Module:
    """Return the network of a recipe with random weights, in evaluation mode.

    Raises:
        InputError: it is for other channels or dimensions than the data.
    """
    torch.manual_seed(seed)
    if recipe.model in SIZES:
        return ConvNeXtV2Encoder(**encoder_options(recipe)).eval()
    try:
        return foreign_encoder(recipe).eval()
    except ValueError as error:
        raise InputError("model", recipe.model, str(error)) from error


def pooled(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function of images `(B, C, *size)` that returns the means of the last map over space, `(B, D)`."""
    stages = stages_of(encoder)

    def call(images: Tensor) -> Tensor:
        found: Any = stages.maps(encoder, images, last=1)[0]  # type: ignore[arg-type]
        return found.flatten(2).mean(2)

    return call


def pixels(images: Tensor) -> Tensor:
    """Return the pixels of images `(B, C, *size)`, of larger ones shrunk to 32 on a side, `(B, C * 32 * 32)`."""
    sides = [min(side, PIXELS) for side in images.shape[2:]]
    if list(images.shape[2:]) != sides:
        images = nn.functional.interpolate(images, sides, mode="area")
    return images.flatten(1)


@torch.no_grad()
def features(
    of: Callable[[Tensor], Tensor],
    labelled: Labelled,
    recipe: Recipe,
    device: torch.device,
    workers: int,
    skipped: dict[str, str],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the features of images, float32 `(N, D)`, and their classes, int64 `(N,)`.

    The image is resized until it just covers the size of the recipe, and cut out in the centre.

    Args:
        of: returns the features of normalised images.
        labelled: the images.
        recipe: says how they are read, resized and normalised.
        device: where `of` computes.
        workers: processes that read images.
        skipped: takes the names of images that cannot be read, and why.

    Raises:
        InputError: no image can be read.
    """
    found, kept = [], []
    for places, images in read(labelled, recipe, workers, skipped):
        inputs = normalize(images.to(device), recipe).nan_to_num(0)
        found.append(of(inputs).float().cpu().numpy())
        kept.append(places)
    if not found:
        raise InputError("data", labelled.source.root, f"no image can be read, such as {next(iter(skipped.items()))}")
    return np.concatenate(found), labelled.classes[np.concatenate(kept)]


def read(
    labelled: Labelled, recipe: Recipe, workers: int, skipped: dict[str, str], share: float = 1.0
) -> Iterator[tuple[NDArray[Any], Tensor]]:
    """Yield batches of images, `(B, C, *size)`, and their numbers among those of `labelled`.

    Args:
        labelled, recipe, workers, skipped: see `features`.
        share: see `Crops.central`.
    """
    loader = DataLoader(
        _Centres(labelled, recipe, share),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_parent,
    )
    for batch in loader:
        good = [(number, image) for number, image in batch if isinstance(image, Tensor)]
        skipped.update(image for _, image in batch if not isinstance(image, Tensor))
        if good:
            numbers, images = zip(*good, strict=True)
            yield np.array(numbers), torch.stack([image.float() for image in images])


class _Centres(Dataset[Any]):
    """The images, whole; in place of one that cannot be read its name and the reason."""

    def __init__(self, labelled: Labelled, recipe: Recipe, share: float) -> None:
        self.share = share
        self.crops = Crops(labelled.source, recipe)

    def __len__(self) -> int:
        return len(self.crops.source)

    def __getitem__(self, number: int) -> tuple[int, Tensor | tuple[str, str]]:
        try:
            return number, self.crops.central(number, self.share)
        except Exception as error:  # decoders raise many kinds of errors
            return number, (self.crops.source.name(number), f"{type(error).__name__}: {error}")
