"""Where a run's numbers go: `log.jsonl`, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparsecnx.train.errors import printable

LOG = "log.jsonl"


class LogError(Exception):
    """A log that could not be written; the message names the file and says why."""


class StepRecord(NamedTuple):
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        epoch: the same in epochs.
        loss: mean over the images of the step, before its update.
        lr: learning rate of the update.
        grad_norm: norm of all gradients, before clipping.
        images_per_s: over this step, waiting for data included.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float


class RunLog:
    """Writes every step to `log.jsonl` and TensorBoard, and shows progress, images/s and time left.

    Args:
        folder: the run's.
        step: steps already done; later lines of an earlier attempt are dropped.
        total_steps: of the whole run.
        images_per_step: effective batch.

    Raises:
        LogError: here, in `write` and on leaving: no space, or another failure of the file system.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.path = folder / LOG
        with _writing(self.path):
            _keep_steps_up_to(step, self.path)
            self.lines = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self.events = folder / "events.out.tfevents.*"  # the writer does not tell the rest
        with _writing(self.events):
            self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)
        self.bar = tqdm(
            total=total_steps * images_per_step,
            initial=step * images_per_step,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,  # in a pipe or a scheduler's log, the lines of `say` are enough
        )

    def __enter__(self) -> RunLog:
        self.choices = _Choices(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.choices.close()
        self.bar.close()
        # A run that stops for another reason says that one.
        with suppress(*(() if error is None else (LogError,))):
            try:
                with _writing(self.events):
                    self.tensorboard.close()
            finally:
                with _writing(self.path):
                    self.lines.close()

    def write(self, record: StepRecord) -> None:
        """Log one step."""
        with _writing(self.path):
            self.lines.write(json.dumps(record._asdict()) + "\n")
        with _writing(self.events):
            for name in ("loss", "lr", "grad_norm", "images_per_s", "epoch"):
                self.tensorboard.add_scalar(f"pretrain/{name}", getattr(record, name), record.step)
        self.bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.lr:.2e}", refresh=False)
        self.bar.update(self.images_per_step)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(printable(line))
        sys.stdout.flush()


class _Choices(logging.Handler):
    """Says which implementation each operator runs on, see `sparsecnx.backends.dispatch`, until it is closed."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self.log = log
        self.logger = logging.getLogger("sparsecnx")
        self.level_before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.log.say(record.getMessage())

    def close(self) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)
        super().close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name `path` in what the file system says."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{path} could not be written ({error})") from error


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Drop what an earlier attempt logged after the checkpoint that is resumed from."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step(line) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step(line: str) -> float:
    """Step of a log line; infinity for a line cut short by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
