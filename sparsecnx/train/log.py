"""The log of a run: `log.jsonl`, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparsecnx.common.files import printable, write_atomically

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
        images_per_s: over this step, including the wait for data.
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
        folder: folder of the run.
        step: steps already done; lines of later steps are deleted from `log.jsonl`.
        total_steps: steps of the whole run.
        images_per_step: effective batch.

    Raises:
        LogError: no space, or another failure of the file system; also raised by `write` and on leaving.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.path = folder / LOG
        with _writing(self.path):
            _keep_steps_up_to(step, self.path)
            self.lines = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self.events = folder / "events.out.tfevents.*"  # the writer does not tell the rest of the name
        with _writing(self.events):
            self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)
        self.bar = tqdm(
            total=total_steps * images_per_step,
            initial=step * images_per_step,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,  # no bar unless standard error is a terminal
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.bar.close()
        # If the run stops for another reason, that one is reported.
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
            for name, value in record._asdict().items():
                if name != "step":
                    self.tensorboard.add_scalar(f"pretrain/{name}", value, record.step)
        self.bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.lr:.2e}", refresh=False)
        self.bar.update(self.images_per_step)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(printable(line))
        sys.stdout.flush()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into LogErrors that name `path`."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{path} could not be written ({error})") from error


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Delete the lines of steps after `step`, which an earlier attempt logged."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """Return the step of a log line, or infinity for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
