"""The pictures of a run.

runs/demo/reconstructions/step-00000540.jpg     the same few images under the same masks, as the run learns
runs/demo/samples.png                           the last of them
runs/demo/loss.png                              loss and learning rate against epochs
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import InputError
from sparsecnx.common.files import open_atomically
from sparsecnx.models.masked_encoder import MaskedEncoder
from sparsecnx.train.callbacks import Callback, LogError, Run, naming
from sparsecnx.train.data.crops import Crops, Draw, mix
from sparsecnx.train.data.scale import normalize, values_in
from sparsecnx.train.log import LOG, read_line
from sparsecnx.train.masks import Masks
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import SHOWN_PHOTOGRAPHS, SHOWN_VOLUMES, picture, reconstructs

RECONSTRUCTIONS = "reconstructions"
POINTS = 1000  # of a curve; each is a mean over the steps of one part of the run


class Reconstructions:
    """Draws a few crops of the data, which stay the same, under the same masks, and leaves the run as it was.

    Args:
        crops: the data of the run.
        recipe: of the run. At most a batch is drawn, so that it takes no more memory than a step.
        every: epochs between two pictures; 0 for no picture, None for a tenth of the run.
    """

    def __init__(self, crops: Crops, recipe: Recipe, every: int | None) -> None:
        self.crops, self.recipe = crops, recipe
        self.images: Tensor | None = None
        most = SHOWN_PHOTOGRAPHS if recipe.ndim == 2 else SHOWN_VOLUMES
        self.count = min(most, recipe.batch_size, len(crops.source))
        self.masks = Masks(replace(recipe, batch_size=self.count), Processes())  # of one process, as every one draws
        self.every = max(1, (recipe.epochs - recipe.first_epoch) // 10) if every is None else every

    def due(self, epoch: int) -> bool:
        """Return whether there is a picture after so many epochs. The last epoch has one, where there are any."""
        drawn = self.every > 0 and reconstructs(self.recipe)
        return drawn and (epoch % self.every == 0 or epoch == self.recipe.epochs)

    def read(self) -> Tensor:
        """Return the images that are drawn, which are read once.

        Raises:
            LogError: no image can be read any more.
        """
        if self.images is None:
            self.images = self._read()
        return self.images

    def draw(self, model: MaskedEncoder, device: torch.device, step: int) -> Figure:
        """Draw what a model makes of the images after `step` steps, in the dtype of the run.

        Raises:
            LogError: as `read` does.
        """
        pixels = self.read()
        valid, images = values_in(pixels), normalize(pixels.to(device), self.recipe)
        dtype = DTYPES[self.recipe.dtype]
        with _undisturbed(model, device):
            drawn = self.masks.draw(pixels, 0, valid, device)
            mask, valid = drawn.mask.to(device), None if drawn.valid is None else drawn.valid.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return picture(model, self.recipe, images, mask, valid, step)[0]

    def _read(self) -> Tensor:
        """Return crops of images that are spread evenly over the data, as training takes them."""
        found = []
        for place in (i * len(self.crops.source) // self.count for i in range(self.count)):
            sample = self.crops[Draw(place, mix(self.recipe.seed, "drawn", place))]
            if isinstance(sample, InputError):
                raise LogError(f"{RECONSTRUCTIONS} could not be drawn ({sample})")
            found.append(sample.image)
        return torch.stack(found)


@contextmanager
def _undisturbed(model: MaskedEncoder, device: torch.device) -> Iterator[None]:
    """Put a model in evaluation mode, and afterwards every module and generator into the state that it had."""
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in training:
                module.training = mode


class Pictures(Callback):
    """Keeps the pictures of a run in its folder, and draws its losses when it is complete.

    Args:
        shown: name of the pictures whose last one is kept as `samples.png`.
    """

    def __init__(self, shown: str = RECONSTRUCTIONS) -> None:
        self.shown = shown

    def start(self, run: Run) -> None:
        self.folder, self.total_steps = run.folder, run.total_steps
        self.last: Figure | None = None

    def figure(self, name: str, figure: Figure, step: int) -> None:
        path = self.folder / name / f"step-{step:08d}.jpg"
        with naming(path):
            path.parent.mkdir(exist_ok=True)
        _save(figure, path)
        if name == self.shown:
            self.last = figure

    def end(self, complete: bool) -> None:
        if not complete:
            return
        if self.last is not None:
            _save(self.last, self.folder / "samples.png")
        _save(draw_losses(self.folder / LOG, self.total_steps), self.folder / "loss.png")


def _save(figure: Figure, path: Path) -> None:
    with naming(path), open_atomically(path) as (file,):
        figure.savefig(file, format=path.suffix[1:])


def draw_losses(log: Path, total_steps: int) -> Figure:
    """Draw loss and learning rate of every step in `log`, the log of a run of `total_steps` steps, against epochs."""
    points = min(POINTS, total_steps)
    sums = [[0.0] * 4 for _ in range(points)]  # steps, and their epochs, losses and learning rates
    with naming(log), open(log) as lines:
        for record in filter(None, map(read_line, lines)):
            if record.get("grad_norm") == 0:  # nothing was learned in this step, see `StepRecord.idle`
                continue
            point = sums[(record["step"] - 1) * points // total_steps]
            for i, value in enumerate((1, record["epoch"], record["loss"], record["lr"])):
                point[i] += value
    means = [[total / count for total in totals] for count, *totals in sums if count]
    epochs, *curves = zip(*means, strict=True) if means else ((), (), ())
    figure = Figure(figsize=(8.5, 5), dpi=100, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    drawn = (("loss", "#d1495b"), ("learning rate", "#6c7a89"))
    for axis, (name, colour), values in zip(axes, drawn, curves, strict=True):
        axis.plot(epochs, values, color=colour, linewidth=1.2)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[1].set(xlabel="epoch", ylim=(0, None))
    return figure
