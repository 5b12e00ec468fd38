"""Pretraining as a masked autoencoder: what the training loop of loop.py then trains."""

from __future__ import annotations

from typing import Any

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.models import SIZES
from sparsecnx.train.callbacks import Callback
from sparsecnx.train.data.crops import Batch, Crops
from sparsecnx.train.data.order import mix
from sparsecnx.train.drawing import RECONSTRUCTIONS, Pictures, Reconstructions
from sparsecnx.train.learner import Learner, Pass
from sparsecnx.train.log import RunLog
from sparsecnx.train.loop import Trainer
from sparsecnx.train.masks import Masks
from sparsecnx.train.recipe import Recipe

# Steps times the peak learning rate of a run that learns little. `make demo` has 0.7, the published runs have 600.
LEAST_TRAINING = 0.2


class Pretraining(Trainer):
    """A run of `sparsecnx pretrain`, see `Trainer`."""

    def read(self) -> Crops:
        self.masks = Masks(self.recipe, self.processes)
        crops = Crops(self.source, self.recipe)
        self.reconstructions = Reconstructions(crops, self.recipe, self.options.draw_every)
        return crops

    def make_learner(self) -> Learner:
        return Learner(self.recipe, self.options, self.processes, self.saved)

    def ready(self, batch: Batch, number: int) -> Pass:
        """Return a batch with the masks of a forward pass, which follow the images if they must."""
        try:
            drawn = self.masks.draw(batch.images, number, batch.valid, self.learner.device)
        except InputError as error:
            raise TrainingStopped(f"step {self.step + 1}: {error}, {self.last_good()}") from error
        return Pass(batch.images, batch.targets, drawn, mix(self.recipe.seed, "network", number, self.processes.rank))

    def own_callbacks(self) -> list[Callback]:
        return [Pictures()]

    def checked(self) -> dict[str, Any]:
        return {"masks": self.masks.checksum}

    def end_epoch(self, epoch: int, log: RunLog) -> None:
        """Draw in all processes, which may hold parts of the network, and stop all of them if one of them cannot."""
        if self.reconstructions.due(epoch):
            self.processes.together(self.reconstructions.read)
            figure = self.reconstructions.draw(self.learner.model, self.learner.device, self.step)
            self.processes.together(lambda: log.figure(RECONSTRUCTIONS, figure))

    def describe_task(self) -> tuple[str, str, list[str]]:
        r = self.recipe
        masks = f"mask ratio {r.mask_ratio:g}" if r.masks is None else f"masks of {r.masks}"
        grn = f", GRN per {r.grn_scope}" if r.model in SIZES and r.block == "v2" else ""
        named = [f"{name} ({values['type']})" for name, values in (r.targets or {}).items()]
        weighed = ", with weights that it learns" if r.uncertainty else ""
        lines = [f"predicts {', '.join(named)}{weighed}"] if named else []
        if absent := ", ".join(name for name in r.predicted if name in self.crops.absent):
            lines.append(f"hint: no image that was looked at has a value of {absent}")
        return masks + grn, self._crops(), lines + self._few_steps()

    def _crops(self) -> str:
        """Return what is cut out of the data, for the first lines of a run."""
        r = self.recipe
        if r.photographs and r.patch_size == Recipe.patch_size:
            return f"of {r.pixels} px"
        size, patch = ("x".join(map(str, sides)) for sides in (r.size, r.patch))
        if r.photographs:
            return f"of {size} px in patches of {patch}"
        dimensions, channels = (_counted(*n) for n in ((r.ndim, "dimension"), (r.in_chans, "channel")))
        return f"of {dimensions} and {channels}, normalised by {r.normalize}, crops of {size} in patches of {patch},"

    def _few_steps(self) -> list[str]:
        """Return what the user of a small data set should know."""
        r, first = self.recipe, self.recipe.first_epoch * self.steps_per_epoch
        steps = self.total_steps - first
        if not self.step == first < self.total_steps or steps * r.peak_lr >= LEAST_TRAINING:
            return []
        problem = f"hint: {steps} steps at a learning rate of at most {r.peak_lr:.2g} hardly train a network"
        small = self.options.small_data or first
        remedy = "more --epochs or --epoch-repeats help" if small else "--small-data is a recipe for few images"
        return [f"{problem}; {remedy}"]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
