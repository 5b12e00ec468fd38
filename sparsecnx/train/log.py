"""The log of a run: `log.jsonl`, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from sparsecnx.common.files import printable, write_atomically
from sparsecnx.train.lock import is_open_file

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
        images_per_s: over this step, of all processes, including the wait for data.
        each_images_per_s: the same of each process.
        each_wait_s: seconds that each process waited for data.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    each_images_per_s: list[float]
    each_wait_s: list[float]

    def numbers(self) -> dict[str, float]:
        """Return all but the step by name, those of each process with its number, such as `each_wait_s/0`."""
        found: dict[str, float] = {}
        for name, value in self._asdict().items():
            if isinstance(value, list):
                found |= {f"{name}/{rank}": one for rank, one in enumerate(value)}
            elif name != "step":
                found[name] = value
        return found


class SilentLog:
    """What the processes other than the first log: nothing, but for lines about their files on standard output."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        return

    def write(self, record: StepRecord) -> None:
        return

    def say(self, line: str) -> None:
        if line.startswith("skipped unreadable"):
            print(printable(f"process {self.rank}: {line}"), flush=True)


class RunLog:
    """Writes every step to `log.jsonl` and TensorBoard, and shows progress, images/s and time left.

    Args:
        folder: folder of the run.
        step: steps already done; lines of later steps are deleted from `log.jsonl`.
        total_steps: steps of the whole run.
        images_per_step: effective batch.

    Raises:
        LogError: no space, another failure of the file system, or a file that was removed or replaced meanwhile; also
            raised by `write`, `say` and on leaving.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.path = folder / LOG
        with _writing(self.path):
            _keep_steps_up_to(step, self.path)
            self.lines = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        # TensorBoard shows the files of one folder as one run, in the order of their names.
        self.events_path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        with _writing(self.events_path):
            self.events = open(self.events_path, "xb")  # noqa: SIM115
            self._write_event(file_version="brain.Event:2")
            self._write_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))  # forget later steps
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
        with suppress(OSError):  # standard error may be gone
            self.bar.close()
        # If the run stops for another reason, that one is reported.
        with suppress(*(() if error is None else (LogError,))):
            try:
                with _writing(self.events_path):
                    self.events.close()
            finally:
                with _writing(self.path):
                    self.lines.close()

    def write(self, record: StepRecord) -> None:
        """Log one step."""
        self.expect_files()
        with _writing(self.path):
            self.lines.write(json.dumps(record._asdict()) + "\n")
        values = [Summary.Value(tag=f"pretrain/{name}", simple_value=value) for name, value in record.numbers().items()]
        summary = Summary(value=values)
        with _writing(self.events_path):
            self._write_event(step=record.step, summary=summary)
        with _writing("standard error"):
            self.bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.lr:.2e}", refresh=False)
            self.bar.update(self.images_per_step)

    def expect_files(self) -> None:
        """Raise LogError unless the logs are still the files that were opened.

        The system lets a process write to a file that was removed with its folder, and nobody would ever read it.
        """
        for path, file in ((self.path, self.lines), (self.events_path, self.events)):
            with _writing(path):
                same = is_open_file(path, file.fileno())
            if not same:
                gone = path if path.parent.is_dir() else path.parent
                raise LogError(f"{gone} was removed, renamed or replaced while the run wrote to it")

    def _write_event(self, **fields: Any) -> None:
        """Write one record of TensorBoard, at once: its own writer does so in a thread, which fails late and loudly."""
        RecordWriter(self.events).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.events.flush()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        with _writing("standard output"):
            self.bar.write(printable(line))
            sys.stdout.flush()


@contextmanager
def _writing(path: Path | str) -> Iterator[None]:
    """Turn errors of the file system into LogErrors that name `path`."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{path} could not be written ({error})") from error


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Delete the lines of steps after `step`, which an earlier attempt logged."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)  # a kill can cut a letter in two
        write_atomically(path, "".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """Return the step of a log line, or infinity for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
