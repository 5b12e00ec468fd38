"""The fine-tuning recipes as data: arXiv 2301.00808, appendix A.1, tables 9 to 11, and the published code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecnx.models import SIZES
from sparsecnx.train.recipe import Recipe

LAYER_DECAY_TYPES = ("single", "group")
# Fields of the pretraining that say what the network and the data are, which fine-tuning takes from its checkpoint.
TAKEN = (
    *("model", "patch_size", "grn_scope", "block", "stem_type", "norm_eps", "grn_eps", "dwconv_bias"),
    *("ndim", "in_chans", "normalize", "value_range", "mean", "std", "nodata", "pages", "max_pixels"),
)
# Fields of a pretraining recipe that mean nothing here.
UNUSED = (
    *("method", "mask_ratio", "norm_pix_loss", "masks", "loss_on", "below_tile", "targets", "uncertainty"),
    *("decoder_dim", "decoder_depth", "transform"),
)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class TransferRecipe(Recipe):
    """Everything that decides the losses of a run which trains a pretrained network on labels.

    The fields of `Recipe` that are about masks have no effect.

    Attributes:
        num_classes: classes of the data.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over the blocks.
        layer_decay: learning rate of a layer divided by that of the next one.
        layer_decay_type: `"single"`, every block is a layer, or `"group"`, the blocks are 12 layers as published for
            Base and larger; of our own networks alone. Networks of timm have the layers that timm says.
        min_lr: learning rate at the end.

    Raises:
        InputError: a field is out of range or of another type.
    """

    num_classes: int = 2
    drop_path_rate: float = 0.0
    layer_decay: float = 1.0
    layer_decay_type: str = "single"
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("transform", "masks"):  # code that a file could name
            self._expect(field, getattr(self, field) is None, "none")
        self._expect("num_classes", self.num_classes >= 2, "2 or more")
        self._expect("drop_path_rate", 0 <= self.drop_path_rate < 1, "0 or more, less than 1")
        self._expect("min_lr", 0 <= self.min_lr <= self.peak_lr, f"0 to the peak learning rate, {self.peak_lr:g}")
        self._expect("layer_decay", 0 < self.layer_decay <= 1, "more than 0, at most 1")
        kinds = ", ".join(LAYER_DECAY_TYPES)
        self._expect("layer_decay_type", self.layer_decay_type in LAYER_DECAY_TYPES, f"one of {kinds}")
        own = self.model in SIZES or self.layer_decay_type == "single"
        self._expect("layer_decay_type", own, f"single, since {self.model} is no network of sparsecnx")


@dataclass(frozen=True)
class FinetuneRecipe(TransferRecipe):
    """Everything that decides the losses of a fine-tuning run.

    Attributes:
        labels: share of the labels to train on, drawn by `seed` class by class.
        head_init_scale: factor on the initial weights of the classifier; of our own networks alone.
        label_smoothing: share of the label that goes to all classes alike.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none. Where both are given each batch has one of them.
        random_erasing: probability that a box of an image becomes noise.
        auto_augment: RandAugment as timm writes it, of photographs in colour alone; none for no such change.
        crop_pct: share of the sides of an image that a test crop shows.

    Raises:
        InputError: a field is out of range or of another type.
    """

    epochs: int = 100
    base_lr: float = 5e-4
    crop_area: float | None = 0.08
    labels: float = 1.0
    head_init_scale: float = 0.001
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.25
    auto_augment: str | None = None
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("labels", 0 < self.labels <= 1, "more than 0, at most 1")
        self._expect("label_smoothing", 0 <= self.label_smoothing < 1, "0 or more, less than 1")
        self._expect("random_erasing", 0 <= self.random_erasing <= 1, "0 to 1")
        for field in ("mixup", "cutmix"):
            self._expect(field, 0 <= getattr(self, field) < 100, "0 or more, less than 100")
        self._expect("head_init_scale", 0 < self.head_init_scale <= 1, "more than 0, at most 1")
        self._expect("crop_pct", 0 < self.crop_pct <= 1, "more than 0, at most 1")
        coloured = self.photographs and self.in_chans == 3
        self._expect("auto_augment", self.auto_augment is None or coloured, "none, since the data are no photographs")
        even = not (self.mixup or self.cutmix) or self.batch_size % 2 == 0
        self._expect("batch_size", even, "an even number, since mixup takes images in pairs")

    unused = (*UNUSED, "num_classes")

    def _expect_masks(self) -> None:
        """Nothing is masked."""

    @property
    def called(self) -> str:
        return "fine-tuning of"


def taken(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that fine-tuning has from the recipe of the pretraining."""
    return {name: getattr(recipe, name) for name in TAKEN} | {"image_size": recipe.image_size}


def defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that follow from data of these fields: RandAugment is for photographs in colour."""
    coloured = data.get("normalize", "imagenet") == "imagenet" and data.get("in_chans", 3) == 3
    resized = {} if data.get("ndim", 2) == 2 else {"crop_area": None}
    return resized | {"auto_augment": RAND_AUGMENT if coloured else None}
