"""The log of a run: `log.jsonl`, TensorBoard and the terminal, which every run has, and the callbacks beside them.

Process 0 writes them; the others have `OtherProcess` alone.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from sparsecnx.common.files import printable, write_atomically
from sparsecnx.train.callbacks import Callback, LogError, Run, StepRecord, jpeg, naming
from sparsecnx.train.lock import is_open_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG, TESTS = "log.jsonl", "tests.jsonl"
SKIPPED, UNUSUAL = "skipped unreadable", "unusual values in"  # begin the lines about files


class RunLog:
    """Tells callbacks what happens in a run, in their order. Without any it does nothing.

    Args:
        callbacks: they are started on entering, and ended, the last one first, on leaving.
        run: what they are told at their start.

    Raises:
        LogError: one of them failed; it names the file or the callback.
    """

    def __init__(self, callbacks: Sequence[Callback], run: Run) -> None:
        self.callbacks, self.run, self.step = callbacks, run, run.step
        self.stack = ExitStack()

    def __enter__(self) -> RunLog:
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(self._started(callback))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.stack.__exit__(kind, error, traceback)

    @contextmanager
    def _started(self, callback: Callback) -> Iterator[None]:
        with naming(callback):
            callback.start(self.run)
        try:
            yield
        except BaseException:
            with suppress(LogError), naming(callback):  # the error that stops the run is the one to report
                callback.end(complete=False)
            raise
        with naming(callback):
            callback.end(complete=self.step == self.run.total_steps)

    def write(self, record: StepRecord) -> None:
        """Log one step."""
        self.step = record.step
        for callback in self.callbacks:
            with naming(callback):
                callback.step(record)

    def evaluation(self, values: dict[str, float]) -> None:
        """Log what a test after the last step found."""
        for callback in self.callbacks:
            with naming(callback):
                callback.evaluation(values, self.step)

    def figure(self, name: str, figure: Figure) -> None:
        """Log a picture that was drawn after the last step."""
        for callback in self.callbacks:
            with naming(callback):
                callback.figure(name, figure, self.step)

    def say(self, line: str) -> None:
        """Log a line of text."""
        for callback in self.callbacks:
            with naming(callback):
                callback.say(line)


class JsonLines(Callback):
    """Writes every step to `log.jsonl`, from which it first deletes those that an earlier attempt logged and lost.

    Tests of a network are in `tests.jsonl`, likewise.
    """

    def start(self, run: Run) -> None:
        self.path = run.folder / LOG
        with naming(self.path):
            _keep_steps_up_to(run.step, self.path)
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in end)

    def step(self, record: StepRecord) -> None:
        expect_open(self.path, self.file)
        with naming(self.path):
            named = {name: value for name, value in record._asdict().items() if value != {}}
            self.file.write(json.dumps(named) + "\n")

    def evaluation(self, values: dict[str, float], step: int) -> None:
        path = self.path.with_name(TESTS)
        _keep_steps_up_to(step - 1, path)
        with naming(path), open(path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def end(self, complete: bool) -> None:
        with naming(self.path):
            self.file.close()


class TensorBoard(Callback):
    """Writes steps and pictures to a file of events of its own. TensorBoard shows those of earlier attempts with it."""

    def start(self, run: Run) -> None:
        # TensorBoard shows the files of one folder as one run, in the order of their names.
        self.path = run.folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        with naming(self.path):
            self.file = open(self.path, "xb")  # noqa: SIM115 (closed in end)
            self._write(file_version="brain.Event:2")
            self._write(step=run.step + 1, session_log=SessionLog(status=SessionLog.START))  # forget later steps

    def step(self, record: StepRecord) -> None:
        values = [Summary.Value(tag=f"pretrain/{name}", simple_value=value) for name, value in record.numbers().items()]
        self._write(step=record.step, summary=Summary(value=values))

    def evaluation(self, values: dict[str, float], step: int) -> None:
        found = [Summary.Value(tag=f"test/{name}", simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=found))

    def figure(self, name: str, figure: Figure, step: int) -> None:
        width, height = map(int, figure.get_size_inches() * figure.dpi)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=jpeg(figure))
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=f"pretrain/{name}", image=image)]))

    def end(self, complete: bool) -> None:
        with naming(self.path):
            self.file.close()

    def _write(self, **fields: Any) -> None:
        """Write one record of TensorBoard, at once: its own writer does so in a thread, which fails late and loudly."""
        expect_open(self.path, self.file)
        with naming(self.path):
            RecordWriter(self.file).write(Event(wall_time=time.time(), **fields).SerializeToString())
            self.file.flush()


class Terminal(Callback):
    """Shows one live line with progress, time left, images/s, loss and memory, and prints lines of text above it."""

    def start(self, run: Run) -> None:
        self.images_per_step, self.device = run.images_per_step, run.device
        self.bar = tqdm(
            total=run.total_steps * run.images_per_step,
            initial=run.step * run.images_per_step,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,  # no bar unless standard error is a terminal
        )

    def say(self, line: str) -> None:
        with naming("standard output"):
            self.bar.write(printable(line))
            sys.stdout.flush()

    def step(self, record: StepRecord) -> None:
        with naming("standard error"):
            memory = f"{peak_memory(self.device) / 2**30:.1f}GiB"
            self.bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.lr:.2e}", memory=memory, refresh=False)
            self.bar.update(self.images_per_step)

    def end(self, complete: bool) -> None:
        with suppress(OSError):  # standard error may be gone
            self.bar.close()


class OtherProcess(Callback):
    """Prints what the processes other than the first have to say: which files they skipped or found unusual."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def say(self, line: str) -> None:
        if line.startswith((SKIPPED, UNUSUAL)):
            print(printable(f"process {self.rank}: {line}"), flush=True)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process had at a time: of tensors on a CUDA device, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def expect_open(path: Path, file: IO[Any]) -> None:
    """Raise LogError unless `path` is still the file that was opened.

    The system lets a process write to a file that was removed with its folder, and nobody would ever read it.
    """
    with naming(path):
        same = is_open_file(path, file.fileno())
    if not same:
        gone = path if path.parent.is_dir() else path.parent
        raise LogError(f"{gone} was removed, renamed or replaced while the run wrote to it")


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Delete the lines of steps after `step`, which an earlier attempt logged."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)  # a kill can cut a letter in two
        kept = [line for line in lines if (record := read_line(line)) is not None and record["step"] <= step]
        write_atomically(path, "".join(kept))


def read_line(line: str) -> dict[str, Any] | None:
    """Return the fields of a line of `log.jsonl`, or None for a line that a kill cut short."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
