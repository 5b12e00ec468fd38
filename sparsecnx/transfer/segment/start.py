"""The beginning of a segmentation run: from a checkpoint, from random weights, or one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from sparsecnx.common.errors import InputError
from sparsecnx.train import contents
from sparsecnx.train.command import Command
from sparsecnx.train.data.address import trusted
from sparsecnx.train.data.source import Source
from sparsecnx.train.loop import Trainer
from sparsecnx.train.start import run
from sparsecnx.transfer.labels import how_read
from sparsecnx.transfer.options import UNUSED as UNUSED_OPTIONS
from sparsecnx.transfer.options import FinetuneOptions
from sparsecnx.transfer.recipe import UNUSED, taken
from sparsecnx.transfer.segment.maps import Mapped, class_names, find_maps
from sparsecnx.transfer.segment.recipe import CROP, SegmentRecipe, small_data
from sparsecnx.transfer.segment.training import SEGMENTATION, Segmentation
from sparsecnx.transfer.start import TransferStart

HIDDEN = {*UNUSED_OPTIONS, *UNUSED, "transform"} - {"small_data", "draw_every", "decoder_dim"}


@dataclass(frozen=True)
class SegmentOptions(FinetuneOptions):
    """Data, output folder and device of a run; the recipe decides everything else.

    Attributes:
        data: a folder with images and labels, label maps of the same names, or with such folders in train and val; or
            python:module:function, whose items are dicts of an image and labels.
        test: likewise, what to test on; none for val beside train, or for a fifth of the images.
        output: folder of checkpoints and logs; None for that of the resumed checkpoint, or `runs/segment`.
        small_data: take defaults for few images and a CPU in place of the published ones.
        draw_every: epochs between pictures of predictions; 0 for none, None for a tenth of the run.
    """


SEGMENT = Command(
    "segment",
    "Train a segmenter, UPerNet or a U-Net, from a pretrained network. Ctrl-C and SIGTERM save a checkpoint and exit "
    "with 130 and 143; --resume goes on from it with the same losses. Under torchrun all processes train one network.",
    SegmentOptions,
    SegmentRecipe,
    files("sparsecnx.transfer.segment") / "recipes",
    HIDDEN,
)


def segment(options: SegmentOptions, given: Mapping[str, Any]) -> int:
    """Start or resume a run and train to its end; result and errors are those of `sparsecnx.train.start.pretrain`.

    Args:
        options: checkpoint, data, output folder and device.
        given: recipe fields that the user chose; the others are the published ones, those of the pretraining, or those
            of the resumed run.
    """
    return run(SegmentStart, options, given, "runs/segment")


class SegmentStart(TransferStart):
    """What a run of `sparsecnx segment` begins with in each of its processes."""

    def new(self) -> Trainer:
        options, given = self.options, dict(self.given)
        self.expect_new()
        if options.data is None:
            raise InputError("data", None, "expected a folder with images and labels, or python:module:function")
        pretrained = self.pretrained()
        trained, tested = find_maps(options.data, options.test, self.reading(pretrained))
        names = class_names(options.data, given.get("num_classes"))
        own = {"image_size": CROP} | trained.defaults(given) if pretrained is None else taken(pretrained)
        fields = own | (small_data(len(trained)) if options.small_data else {}) | given
        if fields.get("ndim", 2) == 3:
            fields = {"architecture": "unet", **fields, "crop_area": None}
        recipe = SegmentRecipe(**{**fields, "num_classes": len(names)})
        notes = trained.describe(recipe, given) if self.processes.main else []
        return self._trainer(recipe, trained, tested, names, notes)

    def resumed(self, checkpoint: Path) -> Trainer:
        notes: list[str] = []
        saved, where = self.read(checkpoint, SEGMENTATION, notes)
        test = trusted(saved.data.test, self.options.test, "test", "resume", checkpoint)
        trained, tested = find_maps(str(where), test, how_read(saved.recipe))
        trained.seen[:] = saved.data.seen or []
        saved = self.continued(saved, trained, trained.fingerprint())
        return self._trainer(saved.recipe, trained, tested, tuple(saved.data.classes or ()), notes, saved)

    def _trainer(
        self,
        recipe: SegmentRecipe,
        trained: Source,
        tested: Source,
        names: tuple[str, ...],
        notes: list[str],
        saved: contents.Contents | None = None,
    ) -> Trainer:
        return Segmentation(
            recipe,
            trained,
            trained.fingerprint(),
            *self.place(),
            trained=Mapped(trained, names),
            tested=Mapped(tested, names),
            start=self._load,
            saved=saved,
            notes=notes,
        )

    def _load(self, model: nn.Module) -> None:
        network: Any = model
        self.load(network.encoder.network)
