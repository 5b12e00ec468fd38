"""Test a classifier: top-1, top-5, calibration, and each class."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.common.files import open_atomically
from sparsecnx.train import contents
from sparsecnx.train.data.address import trusted
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.learner import chosen_device
from sparsecnx.transfer.classifier import FINETUNING
from sparsecnx.transfer.features import read
from sparsecnx.transfer.labels import (
    TESTING,
    TRAINING,
    Labelled,
    find_labelled,
    fingerprint,
    how_read,
    open_labelled,
    share_of,
)
from sparsecnx.transfer.recipe import FinetuneRecipe
from sparsecnx.transfer.report import aligned, draw_confusion

RESULT, CONFUSION = "evaluation.json", "confusion.png"
TOP = 5
BINS = 15  # of the expected calibration error


class Scores(NamedTuple):
    """Hold what a classifier says of images.

    Attributes:
        logits: float32 `(N, classes)`.
        classes: those of the images, int64 `(N,)`.
        skipped: images that cannot be read, and why.
    """

    logits: NDArray[Any]
    classes: NDArray[Any]
    skipped: dict[str, str]

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Return the scores of several parts of the images as one."""
        skipped = {name: reason for one in parts for name, reason in one.skipped.items()}
        logits, classes = ([getattr(one, name) for one in parts] for name in ("logits", "classes"))
        return cls(np.concatenate(logits), np.concatenate(classes), skipped)

    def overall(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, the mean over the classes, cross entropy and expected calibration error.

        The calibration error is that of the largest probability, in 15 bins of equal width.
        """
        from torchmetrics.functional import classification as metrics

        logits, classes = torch.from_numpy(self.logits), torch.from_numpy(self.classes)
        number = logits.shape[1]

        def accuracy(top: int, average: Any) -> float:
            return float(metrics.multiclass_accuracy(logits, classes, number, average=average, top_k=top))

        found = {"top1": accuracy(1, "micro")}
        if number > TOP:
            found[f"top{TOP}"] = accuracy(TOP, "micro")
        there = np.bincount(self.classes, minlength=number) > 0
        recalls = metrics.multiclass_recall(logits, classes, number, average=None).numpy()
        found["mean_class"] = float(recalls[there].mean())
        found["loss"] = float(torch.nn.functional.cross_entropy(logits, classes))
        probabilities = logits.softmax(1)
        found["calibration_error"] = float(metrics.multiclass_calibration_error(probabilities, classes, number, BINS))
        return found

    def by_class(self) -> list[dict[str, Any]]:
        """Return of each class the number of images, recall, precision and F1, None where there is none."""
        from torchmetrics.functional import classification as metrics

        logits, classes = torch.from_numpy(self.logits), torch.from_numpy(self.classes)
        number = logits.shape[1]
        kinds = {
            "recall": metrics.multiclass_recall,
            "precision": metrics.multiclass_precision,
            "f1": metrics.multiclass_f1_score,
        }
        found = {name: kind(logits, classes, number, average=None).tolist() for name, kind in kinds.items()}
        counts = np.bincount(self.classes, minlength=number).tolist()
        return [
            {"images": count, **{name: values[i] if count else None for name, values in found.items()}}
            for i, count in enumerate(counts)
        ]


@torch.no_grad()
def predictions(network: Any, labelled: Labelled, recipe: FinetuneRecipe, device: torch.device, workers: int) -> Scores:
    """Return what a classifier says of the centres of images, in evaluation mode, and leave its mode as it was.

    Args:
        network: takes normalised images and returns logits.
        labelled: the images.
        recipe: says how they are read, resized and normalised, and in which dtype the network runs.
        device: of the network.
        workers: processes that read images.
    """
    training, skipped, found, kept = network.training, dict[str, str](), [], []
    network.eval()
    try:
        dtype = DTYPES[recipe.dtype]
        for numbers, images in read(labelled, recipe, workers, skipped, recipe.crop_pct):
            inputs = normalize(images.to(device), recipe).nan_to_num(0)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found.append(network(inputs).float().cpu().numpy())
            kept.append(numbers)
    finally:
        network.train(training)
    if not found:
        return Scores(np.zeros((0, recipe.num_classes), np.float32), np.zeros(0, np.int64), skipped)
    return Scores(np.concatenate(found), labelled.classes[np.concatenate(kept)], skipped)


def evaluate(
    path: str | Path,
    data: str | None = None,
    out: str | Path | None = None,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    model: str | None = None,
    device: str = "auto",
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> Scores:
    """Test the classifier of a run, and write `evaluation.json` and `confusion.png`.

    Args:
        path: checkpoint of `sparsecnx finetune`.
        data: see `find_labelled`; None for what the run is tested on.
        out: folder to write to, which may hold no results; None for `evaluation` beside the checkpoint.
        weights: `"model"` or `"ema"`; None for the moving average, where there is one.
        image_size: side of the images; None for that of the run.
        model: `module:factory` of the run, where its network was one.
        device: auto, cpu, cuda or one GPU such as cuda:1.
        workers: processes that read images.
        say: takes lines of text.

    Raises:
        InputError: the checkpoint or no image can be read, the classes are others, or `out` holds results.
    """
    try:
        saved = contents.load(path, model, FINETUNING)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    folder = Path(path).parent / "evaluation" if out is None else Path(out)
    if any((folder / name).exists() for name in (RESULT, CONFUSION)):
        raise InputError("out", folder, "holds results already; expected another folder")
    if weights == "ema" and not saved.ema:
        raise InputError("weights", weights, "expected model, since the run kept no moving average")
    where = trusted(saved.data.test, data, "data", "checkpoint", path)
    if where is None:
        folder_of_run = trusted(saved.data.folder, None, "data", "checkpoint", path)
        labelled = held_out(saved, str(folder_of_run))
    else:
        labelled = tested_part(saved.data, where, how_read(saved.recipe))
    recipe = saved.recipe if image_size is None else replace(saved.recipe, image_size=image_size)
    network: Any = FINETUNING.build(recipe)
    network.load_state_dict(saved.model if weights == "model" or not saved.ema else saved.ema)
    there = chosen_device(device)
    scores = predictions(network.to(there), labelled, recipe, there, workers)
    if not len(scores.classes):
        first = next(iter(scores.skipped.items()))
        raise InputError("data", labelled.source.root, f"no image can be read, such as {first}")
    overall, classes = scores.overall(), scores.by_class()
    for name, reason in scores.skipped.items():
        say(f"skipped {name} ({reason})")
    say(f"{len(scores.classes)} images: " + ", ".join(f"{name} {value:.4f}" for name, value in overall.items()))
    say(_table(labelled.names, classes))
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.zeros((len(classes),) * 2, np.int64)
    np.add.at(counts, (scores.classes, scores.logits.argmax(1)), 1)
    by_name = dict(zip(labelled.names, classes, strict=True))
    place = where or saved.data.folder
    result: dict[str, Any] = {
        "checkpoint": str(path),
        "data": place,
        "images": len(scores.classes),
        "skipped": len(scores.skipped),
    }
    result |= {"overall": overall, "classes": by_name}
    with open_atomically(folder / RESULT, folder / CONFUSION) as opened:
        opened[0].write(json.dumps(result, indent=1).encode())
        draw_confusion(counts, labelled.names, str(path)).savefig(opened[1], format="png")
    return scores


def held_out(saved: contents.Contents, where: str) -> Labelled:
    """Return the fifth of the images of a run that it is tested on.

    Raises:
        InputError: the images are not those of the run any more, so that it may be others that are held out.
    """
    trained, tested = find_labelled(where, None, how_read(saved.recipe))
    found = fingerprint(share_of(trained, saved.recipe))
    same = (found.names, found.sizes) == (saved.data.fingerprint, saved.data.sizes)
    if list(trained.names) != saved.data.classes or not same:
        problem = "its images changed since the run, so that others are held out; expected the same, or --data"
        raise InputError("data", where, problem)
    return tested


def tested_part(run: contents.Data, where: str, reading: Mapping[str, Any]) -> Labelled:
    """Return labelled images with the classes of a run.

    Raises:
        InputError: they have a class that the run has not.
    """
    if os.path.isdir(os.path.join(where, TRAINING)):
        where = next((part for name in TESTING if os.path.isdir(part := os.path.join(where, name))), where)
    source, named = open_labelled(where, "data", reading)
    names = tuple(run.classes or ())
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted(set(named) - set(names)):
        raise InputError(
            "data", where, f"has the class {unknown[0]}, which the run has not; expected {', '.join(names)}"
        )
    return Labelled(source, np.array([numbers[name] for name in named]), names)


def _table(names: Sequence[str], classes: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of each class as text."""
    rows = [["class", *classes[0]]]
    for name, one in zip(names, classes, strict=True):
        numbers = (f"{value:.3f}" if isinstance(value, float) else value for value in one.values())
        rows.append([name, *("-" if value is None else str(value) for value in numbers)])
    return aligned(rows)
