"""Callbacks: the interface through which a run writes every log, those of the user too.

from sparsecnx.train.callbacks import Callback

class Losses(Callback):                     # in my_logs.py; sparsecnx pretrain --log my_logs:Losses
    def step(self, record):
        print(record.step, record.loss)
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A message of torch that begins so comes from its handler of a signal, wherever the run is at that moment.
READER_DIED = "DataLoader worker"


class LogError(Exception):
    """A log that could not be written; the message names it and says why."""


class StepRecord(NamedTuple):
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        epoch: the same in epochs.
        loss: mean over the images of the step, before its update.
        lr: learning rate of the update.
        grad_norm: norm of all gradients, before clipping.
        images_per_s: over this step, of all processes, including the wait for data.
        each_images_per_s: the same of each process.
        each_wait_s: seconds that each process waited for data.
        losses: that of each target, see `Recipe.targets`, without its weight; empty where there are none.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    each_images_per_s: list[float]
    each_wait_s: list[float]
    losses: dict[str, float]

    @property
    def idle(self) -> bool:
        """Return whether no value counted in the loss, which is then 0, as all gradients are."""
        return self.grad_norm == 0

    def numbers(self) -> dict[str, float]:
        """Return all but the step by name, such as `each_wait_s/0` of process 0 and `losses/biome` of a target."""
        found: dict[str, float] = {}
        for name, value in self._asdict().items():
            if isinstance(value, (list, dict)):
                parts = value.items() if isinstance(value, dict) else enumerate(value)
                found |= {f"{name}/{part}": one for part, one in parts}
            elif name != "step":
                found[name] = value
        return found


class Run(NamedTuple):
    """A run that begins or goes on.

    Attributes:
        folder: folder of the run.
        step: steps already done; later ones, of an attempt that was killed, will be told again.
        total_steps: steps of the whole run.
        images_per_step: effective batch.
        device: where the model is.
        config: fields of the recipe, and the folder and number of the images.
    """

    folder: Path
    step: int
    total_steps: int
    images_per_step: int
    device: torch.device
    config: Mapping[str, Any]


class Callback:
    """Is told what happens in a run, in the process that writes its logs. Every method may be left out.

    An exception stops the run, which names the callback and the last good checkpoint.
    """

    def __str__(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def start(self, run: Run) -> None:
        """Begin, before the first step."""

    def say(self, line: str) -> None:
        """Take a line of text: what is trained on what, the end of an epoch, a file that was skipped."""

    def step(self, record: StepRecord) -> None:
        """Take one step."""

    def evaluation(self, values: dict[str, float], step: int) -> None:
        """Take what a test after `step` steps found, such as `top1`."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Take a picture, such as `reconstructions`, that was drawn after `step` steps."""

    def end(self, complete: bool) -> None:
        """Finish: the run is complete, or it stops before that. It is called for every callback that was started."""


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Turn every error into a LogError that names `what`, a callback or a file, and the line that failed."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{what} could not be written ({error})") from error
    except Exception as error:  # code of the user, and libraries, can raise anything
        if isinstance(error, LogError) or str(error).startswith(READER_DIED):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name} line {place.lineno}"
        text = " ".join(str(error).split())
        raise LogError(f"{what} failed ({type(error).__name__}: {text}, {where})") from error


def jpeg(figure: Figure) -> bytes:
    """Return a figure as the bytes of a JPEG file."""
    file = BytesIO()
    figure.savefig(file, format="jpg", pil_kwargs={"quality": 90})
    return file.getvalue()
