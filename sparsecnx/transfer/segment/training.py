"""Segmentation: what the training loop of loop.py trains, and its tests."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.models import SIZES, ConvNeXtV2Encoder
from sparsecnx.train.callbacks import Callback
from sparsecnx.train.code import TIMM
from sparsecnx.train.contents import Kind, load
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.drawing import Pictures
from sparsecnx.train.learner import Inputs, Learner, Pass
from sparsecnx.train.log import RunLog
from sparsecnx.train.networks import encoder_options, foreign_encoder, freeze_what_is_not_trained
from sparsecnx.transfer.classifier import grouped, layers_of
from sparsecnx.transfer.segment.crops import MapCrops
from sparsecnx.transfer.segment.network import segmenter
from sparsecnx.transfer.segment.recipe import MAPS, SegmentRecipe
from sparsecnx.transfer.segment.scores import MapScores, draw_predictions, map_scores
from sparsecnx.transfer.trainer import Transfer

PREDICTIONS = "predictions"  # names the pictures of a run
ENCODER = "encoder.network."  # stands before the names of the network that was pretrained


def build_segmenter(recipe: SegmentRecipe) -> nn.Module:
    """Build the network that a recipe trains, with weights drawn from torch's global generator.

    Raises:
        InputError: there is no such network for these data.
    """
    rate: dict[str, Any] = {"drop_path_rate": recipe.drop_path_rate} if recipe.drop_path_rate else {}
    made = recipe.num_classes, recipe.architecture, recipe.decoder_dim
    try:
        if recipe.model in SIZES:
            return segmenter(ConvNeXtV2Encoder(**encoder_options(recipe), **rate), *made)
        with torch.device("cpu"):
            encoder = foreign_encoder(recipe, **(rate if recipe.model.startswith(TIMM) else {}))
            model = segmenter(encoder, *made)
            images = torch.zeros(1, recipe.in_chans, *(2 * patch for patch in recipe.patch))
            freeze_what_is_not_trained(model, lambda: model(images).sum())
        return model
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("model", recipe.model, f"cannot be trained to segment ({error})") from error


def layer_groups(model: Any, recipe: SegmentRecipe) -> list[dict[str, Any]]:
    """Return AdamW's groups, as those of fine-tuning; the decoder is in the layer behind the last of the network."""
    network = model.encoder.network
    layers = {f"{ENCODER}{name}": number for name, number in layers_of(network, network, recipe).items()}
    last = max(layers.values()) + 1
    return grouped(model, {name: layers.get(name, last) for name, _ in model.named_parameters()}, recipe)


SEGMENTATION = Kind("segment", SegmentRecipe, build_segmenter, layer_groups)


def load_segmenter(path: str | Path, model: str | None = None) -> nn.Module:
    """Return the network of a run of `sparsecnx segment`, its moving average where it has one, in evaluation mode.

    Args:
        path: a checkpoint of the run.
        model: its `module:factory`, if it has one: a file alone runs no code.

    Raises:
        InputError: the file cannot be read, or is of another command.
    """
    try:
        saved = load(path, model, SEGMENTATION)
    except CheckpointError as error:
        raise InputError("checkpoint", path, str(error)) from error
    network = build_segmenter(saved.recipe)
    network.load_state_dict(saved.ema or saved.model)
    return network.eval()


class Segmenting(Learner):
    """The segmenter of a run, see `Learner`."""

    kind = SEGMENTATION

    def checkpoint_gradients(self) -> None:
        self.model.encoder.network.set_grad_checkpointing()

    def inputs(self, one: Pass) -> Inputs:
        """Move a pass to the device, and normalise its images."""
        images = self.normalized(one.images).nan_to_num(0)
        return Inputs(images, {MAPS: self.moved(one.targets[MAPS])}, one.seed)

    def network_losses(self, one: Inputs, counts: Tensor | None) -> list[Tensor]:
        """Return the mean cross entropy over the pixels that have a class."""
        truth, ignored = one.given[MAPS], self.recipe.ignore_index
        logits = self.forward(one.images).float()
        total = nn.functional.cross_entropy(logits, truth, ignore_index=ignored, reduction="sum")
        return [total / (truth != ignored).sum().clamp(min=1)]

    def share(self, one: Inputs) -> Tensor:
        """Return the share of the pixels that have a class, `(1,)`."""
        return (one.given[MAPS] != self.recipe.ignore_index).float().mean()[None]


class Segmentation(Transfer):
    """A run of `sparsecnx segment`, see `Transfer`."""

    recipe: SegmentRecipe
    learns = Segmenting

    def read(self) -> Crops:
        each = self.recipe.batch_size // self.processes.world
        if self.recipe.architecture == "upernet" and each == 1:
            expected = f"expected 2 or more for each of the {self.processes.world} processes"
            raise InputError("batch_size", self.recipe.batch_size, expected)
        self.tested.source.check(self.recipe)
        self.whole.check_maps("test" if self.options.test else "data")
        return MapCrops(self.source, self.recipe)

    @cached_property
    def whole(self) -> MapCrops:
        """Return the images to test on."""
        return MapCrops(self.tested.source, self.recipe)

    def own_callbacks(self) -> list[Callback]:
        return [Pictures(PREDICTIONS)]

    def test(self, network: Any) -> tuple[dict[str, float], dict[str, str]]:
        """Test in all processes: each a part of the images, or all of them where they hold parts of the network."""
        rank, world = (0, 1) if self.options.shard else (self.processes.rank, self.processes.world)
        places = range(rank, len(self.tested.source), world)
        found = map_scores(network, self.whole, places, self.trained.names, self.learner.device, self.workers)
        scores = MapScores.joined([found] if self.options.shard else self.processes.gathered(found))
        return scores.overall(), scores.skipped

    def end_epoch(self, epoch: int, log: RunLog) -> None:
        """Test the network, and draw what it predicts."""
        super().end_epoch(epoch, log)
        every = self.options.draw_every
        every = max(1, self.recipe.epochs // 10) if every is None else every
        if not every or (epoch != self.recipe.epochs and epoch % every):
            return
        network, device = self.learner.model, self.learner.device
        figure = draw_predictions(network, self.whole, self.trained.names, device, f"step {self.step}")
        if figure is not None:
            self.processes.together(lambda: log.figure(PREDICTIONS, figure))

    def describe_task(self) -> tuple[str, str, list[str]]:
        r, names = self.recipe, self.trained.names
        decay = f"layer decay {r.layer_decay:g} by {r.layer_decay_type}" if r.layer_decay < 1 else "no layer decay"
        told = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        line = f"{len(names)} classes: {told}; {len(self.tested.source)} images to test on"
        return decay, f"with label maps, crops of {r.pixels} px", [line]
