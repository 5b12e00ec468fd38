"""What decides the losses of a segmentation run: arXiv 2301.00808, appendix A.4, and defaults for few images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsecnx.models import ClassMapTarget
from sparsecnx.models.targets import Target
from sparsecnx.transfer.recipe import TransferRecipe
from sparsecnx.transfer.segment.network import ARCHITECTURES

MAPS = "labels"  # names the maps of a batch, the folder that they lie in, and the key of an item of Python
CROP = 512  # side of a crop, as published
SMALL_EPOCH = 160  # images that an epoch of a small data set shows at least


@dataclass(frozen=True)
class SegmentRecipe(TransferRecipe):
    """Everything that decides the losses of a segmentation run.

    Attributes:
        num_classes: classes of the label maps, numbered from 0; by default as many as classes.txt beside them names.
        architecture: `"upernet"` or `"unet"`, see `segmenter`.
        decoder_dim: channels of UPerNet's decoder, none for 512 as published; or of the coarsest map of the U-Net's,
            none for 256.
        ignore_index: value of pixels without a class in the label maps.

    Raises:
        InputError: a field is out of range or of another type.
    """

    epochs: int = 127
    batch_size: int = 16
    base_lr: float = 1.6e-3
    min_lr: float = 0.0
    architecture: str = "upernet"
    ignore_index: int = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ARCHITECTURES if self.ndim == 2 else ARCHITECTURES[1:]
        self._expect("ndim", self.ndim > 1, "2 or 3")
        self._expect("architecture", self.architecture in choices, f"one of {', '.join(choices)}")
        outside = not 0 <= self.ignore_index < self.num_classes
        self._expect("ignore_index", outside, f"none of the classes 0 to {self.num_classes - 1}")
        self._expect("ignore_index", -(2**31) <= self.ignore_index < 2**31, "a number of 32 bits")
        normed = self.architecture != "upernet" or self.batch_size > 1
        self._expect("batch_size", normed, "2 or more, since UPerNet normalises one value of each image by the batch")

    @property
    def called(self) -> str:
        return f"{self.architecture} on"

    @cached_property
    def predicted(self) -> dict[str, Target]:
        """Return the label map as what is cut out with each crop, see `TargetReader`."""
        return {MAPS: ClassMapTarget(self.num_classes, ignore_index=self.ignore_index)}


def small_data(images: int) -> dict[str, Any]:
    """Return the fields of a recipe for some ten to some hundred images, which a CPU trains on."""
    repeats = max(1, math.ceil(SMALL_EPOCH / images))
    return {"batch_size": 8, "base_lr": 0.032, "epochs": 10, "epoch_repeats": repeats, "decoder_dim": 64}
