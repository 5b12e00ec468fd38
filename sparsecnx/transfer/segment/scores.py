"""Test a segmenter on whole images: intersection over union, accuracy, and pictures of predictions beside truth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import InputError
from sparsecnx.train.data.loader import leave_signals_to_parent
from sparsecnx.train.data.scale import normalize
from sparsecnx.transfer.segment.crops import MapCrops
from sparsecnx.transfer.segment.recipe import SegmentRecipe

SHOWN = 4  # images of a picture
PANEL_INCHES = 2.6
OVERLAP = 0.5  # of the windows of a volume
UNNAMED = re.compile(r"[^ .\w-]")  # letters that a log could refuse
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


class MapScores(NamedTuple):
    """Hold what a segmenter says of images.

    Attributes:
        counts: pixels of each class, a row, that were taken for each class, a column; int64 `(classes, classes)`.
        names: of the classes.
        skipped: images that cannot be read, and why.
    """

    counts: NDArray[Any]
    names: tuple[str, ...]
    skipped: dict[str, str]

    @classmethod
    def joined(cls, parts: Sequence[MapScores]) -> MapScores:
        """Return the scores of several parts of the images as one."""
        skipped = {name: reason for one in parts for name, reason in one.skipped.items()}
        return cls(np.sum([one.counts for one in parts], 0), parts[0].names, skipped)

    def overall(self) -> dict[str, float]:
        """Return the mean IoU, the accuracy of the pixels, that in the mean over the classes, and `iou/NAME` of each.

        IoU is the intersection of prediction and truth over their union. Classes that are in neither have none, and
        count in no mean.
        """
        right, truth, taken = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        union, there = truth + taken - right, truth > 0
        iou = right / np.maximum(union, 1)
        found = {
            "miou": float(iou[union > 0].mean()) if union.any() else 0.0,
            "pixel_accuracy": float(right.sum() / max(truth.sum(), 1)),
            "mean_class": float((right[there] / truth[there]).mean()) if there.any() else 0.0,
        }
        named = zip(self.names, iou, union, strict=True)
        return found | {f"iou/{UNNAMED.sub('_', name)}": float(value) for name, value, number in named if number}


@torch.no_grad()
def map_scores(
    network: Any, crops: MapCrops, places: Sequence[int], names: tuple[str, ...], device: torch.device, workers: int
) -> MapScores:
    """Return what a segmenter says of whole images, in evaluation mode, and leave its mode as it was.

    Args:
        network: takes normalised images and returns logits.
        crops: the images and their maps.
        places: numbers of the images to test on.
        names: of the classes.
        device: of the network.
        workers: processes that read images.

    Raises:
        InputError: no image can be read.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    skipped, recipe = dict[str, str](), crops.recipe
    counts, number = np.zeros((len(names),) * 2, np.int64), 0
    for image, truth in _read(crops, places, workers, skipped):
        found = predicted_map(network, image, truth.shape, recipe, device)
        ignored = recipe.ignore_index
        confusion = multiclass_confusion_matrix(found, truth.to(device), len(names), ignore_index=ignored)
        counts += confusion.cpu().numpy()
        number += 1
    if not number and len(places):
        raise InputError("data", crops.source.root, f"no image can be read, such as {next(iter(skipped.items()))}")
    return MapScores(counts, names, skipped)


@torch.no_grad()
def predicted_map(
    network: Any, image: Tensor, sides: Sequence[int], recipe: SegmentRecipe, device: torch.device
) -> Tensor:
    """Return the classes that a network predicts for an image, int64 `(*sides)`.

    A volume goes through it in windows of the size of the crops, which overlap by half (MONAI's
    `sliding_window_inference`), an image as a whole, padded to multiples of the patch.

    Args:
        network: see `map_scores`.
        image: `(C, *size)`, see `MapCrops.whole_image`.
        sides: of the map.
        recipe: of the run.
        device: of the network.
    """
    training, dtype = network.training, DTYPES[recipe.dtype]
    images = normalize(image[None].to(device), recipe).nan_to_num(0)
    size = images.shape[2:]
    network.eval()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if recipe.ndim == 3:
                from monai.inferers import sliding_window_inference

                logits: Any = sliding_window_inference(images, recipe.size, 1, network, OVERLAP)
            else:
                missing = [-side % patch for side, patch in zip(size, recipe.patch, strict=True)]
                logits = network(F.pad(images, (0, missing[1], 0, missing[0])))[..., : size[0], : size[1]]
    finally:
        network.train(training)
    if tuple(size) != tuple(sides):
        logits = F.interpolate(logits.float(), tuple(sides), mode=INTERPOLATION[recipe.ndim], align_corners=False)
    return logits[0].argmax(0)


def draw_predictions(
    network: Any, crops: MapCrops, names: tuple[str, ...], device: torch.device, title: str
) -> Figure | None:
    """Draw some images, their label maps and what a segmenter predicts; of volumes the slice in the middle.

    Returns:
        The picture; None where no image can be read.
    """
    number, recipe, rows = len(crops.source), crops.recipe, list[tuple[Any, Any, Any]]()
    for image, truth in _read(crops, [i * number // SHOWN for i in range(min(SHOWN, number))], 0, {}):
        found = predicted_map(network, image, truth.shape, recipe, device).cpu()
        maps = torch.stack([truth, found]).masked_fill(truth == recipe.ignore_index, -1)
        if recipe.ndim == 3:
            image, maps = image[:, image.shape[1] // 2], maps[:, maps.shape[1] // 2]
        rows.append((_shown(image), maps[0], maps[1]))
    if not rows:
        return None
    listed: Any = colormaps["tab10"] if len(names) <= 10 else colormaps["turbo"].resampled(len(names))
    colours: Any = ListedColormap(["black", *(listed(number) for number in range(len(names)))])  # black: no class
    figure = Figure(figsize=(3 * PANEL_INCHES, len(rows) * PANEL_INCHES + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for axis, name in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(name)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row[0], cmap="gray")
        for axis, values in zip(line[1:], row[1:], strict=True):
            axis.imshow(values.numpy(), cmap=colours, vmin=-1.5, vmax=len(names) - 0.5, interpolation="nearest")
        for axis in line:
            axis.axis("off")
    return figure


def _shown(image: Tensor) -> NDArray[Any]:
    """Return an image in colour, or its first channel in grey, from its least to its largest value."""
    values = (image if len(image) == 3 else image[:1]).float().nan_to_num(0)
    low = 0.0 if image.dtype == torch.uint8 else values.min()
    high = 255.0 if image.dtype == torch.uint8 else values.max()
    unit = (values - low) / max(float(high - low), 1e-6)
    return (unit.permute(1, 2, 0) if len(unit) == 3 else unit[0]).numpy()


def _read(
    crops: MapCrops, places: Sequence[int], workers: int, skipped: dict[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield whole images and their maps, see `MapCrops`, and note what cannot be read."""
    loader = DataLoader(
        _Whole(crops, places),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )
    for one, other in loader:
        if isinstance(one, Tensor):
            yield one, other
        else:
            skipped[one] = other


class _Whole(Dataset[Any]):
    """Whole images and their maps; in place of one that cannot be read its name and the reason."""

    def __init__(self, crops: MapCrops, places: Sequence[int]) -> None:
        self.crops, self.places = crops, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        place = self.places[number]
        try:
            return self.crops.whole_image(place), self.crops.whole_map(place)
        except Exception as error:  # decoders raise many kinds of errors
            return self.crops.source.name(place), f"{type(error).__name__}: {error}"
