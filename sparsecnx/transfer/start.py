"""The beginning of a fine-tuning run: from a checkpoint, from random weights, or one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.compat.checkpoints import load_encoder
from sparsecnx.train import contents
from sparsecnx.train.command import Command
from sparsecnx.train.data.address import trusted
from sparsecnx.train.loop import Trainer
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.start import Start, run
from sparsecnx.transfer.classifier import FINETUNING, PooledClassifier
from sparsecnx.transfer.features import load_run
from sparsecnx.transfer.finetuning import Finetuning
from sparsecnx.transfer.labels import Labelled, find_labelled, fingerprint, how_read, share_of
from sparsecnx.transfer.options import UNUSED as UNUSED_OPTIONS
from sparsecnx.transfer.options import FinetuneOptions
from sparsecnx.transfer.recipe import TAKEN, FinetuneRecipe, defaults, taken

FINETUNE = Command(
    "finetune",
    "Train a classifier from a pretrained network with the published recipes of ConvNeXt V2: sparsecnx finetune "
    "CHECKPOINT --data FOLDER. Ctrl-C and SIGTERM save a checkpoint and exit with 130 and 143; --resume goes on from "
    "it with the same losses. Under torchrun all processes train one network.",
    FinetuneOptions,
    FinetuneRecipe,
    files("sparsecnx.transfer") / "recipes",
    (*UNUSED_OPTIONS, *FinetuneRecipe.unused),
)


def finetune(options: FinetuneOptions, given: Mapping[str, Any]) -> int:
    """Start or resume a run and train to its end; result and errors are those of `sparsecnx.train.start.pretrain`.

    Args:
        options: checkpoint, data, output folder and device.
        given: recipe fields that the user chose; the others are the published ones, those of the pretraining, or those
            of the resumed run.
    """
    return run(FinetuneStart, options, given, "runs/finetune")


class TransferStart(Start):
    """What a run that takes the network of a checkpoint begins with in each of its processes."""

    def pretrained(self) -> Recipe | None:
        """Return the recipe of the pretraining; None for random weights, or for weights alone.

        Raises:
            InputError: the checkpoint cannot be read, or has another network or other data than the user says.
        """
        path, given = self.options.checkpoint, self.given
        if path is None:
            return None
        run = load_run(path, given.get("model"))
        if run is None:
            return None
        found: Recipe = run.recipe
        for name in TAKEN:
            if name in given and given[name] != getattr(found, name):
                has = f"{path} has {getattr(found, name)}"
                raise InputError(name, given[name], f"{has}; leave it out, or name another checkpoint")
        return found

    def reading(self, pretrained: Recipe | None) -> dict[str, Any]:
        """Return how the images are read, for `find_source`."""
        if pretrained is not None:
            return how_read(pretrained)
        return {name: self.given[name] for name in ("ndim", "in_chans", "pages") if name in self.given}

    def load(self, network: nn.Module) -> None:
        """Load the weights of the checkpoint into a new network, where there is a checkpoint."""
        path = self.options.checkpoint
        if path is None:
            return
        try:
            load_encoder(network, path)
        except CheckpointError as error:
            raise InputError("checkpoint", path, str(error)) from error


class FinetuneStart(TransferStart):
    """What a run of `sparsecnx finetune` begins with in each of its processes."""

    def new(self) -> Trainer:
        options, given = self.options, dict(self.given)
        self.expect_new()
        if options.data is None:
            raise InputError("data", None, "expected a folder of images for each class, or an address")
        pretrained = self.pretrained()
        trained, tested = find_labelled(options.data, options.test, self.reading(pretrained))
        own = trained.source.defaults(given) if pretrained is None else taken(pretrained)
        fields_of_data = own | given
        recipe = FinetuneRecipe(**{**defaults(fields_of_data), **fields_of_data, "num_classes": len(trained.names)})
        trained = share_of(trained, recipe)
        notes = trained.source.describe(recipe, given) if self.processes.main else []
        return self._trainer(recipe, trained, tested, notes)

    def resumed(self, checkpoint: Path) -> Trainer:
        notes: list[str] = []
        saved, where = self.read(checkpoint, FINETUNING, notes)
        test = trusted(saved.data.test, self.options.test, "test", "resume", checkpoint)
        trained, tested = find_labelled(str(where), test, how_read(saved.recipe))
        if list(trained.names) != saved.data.classes:
            raise InputError("data", where, f"has other classes than the run, {', '.join(saved.data.classes or ())}")
        trained = share_of(trained, saved.recipe)
        trained.source.seen[:] = saved.data.seen or []
        saved = self.continued(saved, trained.source, fingerprint(trained))
        return self._trainer(saved.recipe, trained, tested, notes, saved)

    def _trainer(
        self,
        recipe: FinetuneRecipe,
        trained: Labelled,
        tested: Labelled,
        notes: list[str],
        saved: contents.Contents | None = None,
    ) -> Trainer:
        return Finetuning(
            recipe,
            trained.source,
            fingerprint(trained),
            *self.place(),
            trained=trained,
            tested=tested,
            start=self._load,
            saved=saved,
            notes=notes,
        )

    def _load(self, model: nn.Module) -> None:
        self.load(model.encoder if isinstance(model, PooledClassifier) else model)
