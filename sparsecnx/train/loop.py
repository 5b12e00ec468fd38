"""The training loop: step, log, save, and stop on a signal. What is trained is the business of its subclasses."""

from __future__ import annotations

import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from statistics import fmean, harmonic_mean
from types import FrameType
from typing import Any

import torch

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.train.callbacks import READER_DIED, Callback, LogError, Run, StepRecord
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.config import write_config
from sparsecnx.train.contents import Contents
from sparsecnx.train.data.crops import Batch, Crops, draws
from sparsecnx.train.data.loader import WorkersError, load_batches
from sparsecnx.train.data.source import Fingerprint, Source
from sparsecnx.train.learner import Learner, Pass, whole
from sparsecnx.train.log import SKIPPED, UNUSUAL, JsonLines, OtherProcess, RunLog, TensorBoard, Terminal
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.schedule import learning_rate
from sparsecnx.train.services import chosen_callbacks

MOST_NAMED = 20  # files of a kind that all processes of a run name; they count further ones


class Trainer(ABC):
    """One run.

    Attributes:
        crops: what it learns from.
        learner: what it trains, once it is connected.
        step: steps done.
        extends: whether a finished run can be extended.

    Args:
        recipe: decides the losses.
        source: what it reads.
        fingerprint: its hashes.
        folder: folder of the checkpoints and logs.
        options: where and how it computes.
        processes: those that train together; process 0 writes.
        saved: the checkpoint to go on from.
        notes: lines to print when the run begins.

    Raises:
        InputError: an epoch is smaller than the effective batch, nothing can be read, the data do not fit the recipe,
            see `Source.check`, or the processes cannot divide a batch or see different data.
    """

    extends = True

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        fingerprint: Fingerprint,
        folder: CheckpointFolder,
        options: Any,
        processes: Processes,
        saved: Contents | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.recipe, self.source, self.fingerprint = recipe, source, fingerprint
        self.folder, self.options, self.processes, self.notes = folder, options, processes, list(notes)
        source.check(recipe)
        self.crops = self.read()
        self.crops.try_out()
        if recipe.batch_size % processes.world:
            expected = f"expected a multiple of the {processes.world} processes, which divide it"
            raise InputError("batch_size", recipe.batch_size, expected)
        self.steps_per_epoch = recipe.steps_per_epoch(len(source))
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.save_steps = max(1, round(options.save_every * self.steps_per_epoch))
        self.workers = default_workers() if options.workers is None else options.workers
        self.saved = saved
        self.learner: Learner
        self.callbacks: list[Callback] = [OtherProcess(processes.rank)]
        if processes.main:
            asked = chosen_callbacks(options.log)
            self.callbacks = [*asked, JsonLines(), TensorBoard(), *self.own_callbacks(), Terminal()]
        self.step, self.written_by = (0, 1) if saved is None else (saved.step, saved.processes)
        self.unreadable: dict[str, str] = {}
        self.unusual: dict[str, str] = {}
        self.idle = 0  # steps in which nothing could be learned
        self.most_named = max(1, MOST_NAMED // processes.world)

    def state(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, see `checkpoint.read`.

        It needs no state of a generator: every random choice is a function of the seed and the step, see data/crops.py.
        """
        return self.learner.state() | {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "recipe": asdict(self.recipe),
            "processes": self.processes.world,
            "data": {
                "folder": self.source.place,
                "images": len(self.source),
                "fingerprint": self.fingerprint.names,
                "sizes": self.fingerprint.sizes,
                "contents": self.fingerprint.contents,
                **({"seen": list(self.source.seen)} if self.source.seen else {}),
                **self.checked(),
            },
        }

    @abstractmethod
    def read(self) -> Crops:
        """Return what the run learns from."""

    @abstractmethod
    def make_learner(self) -> Learner:
        """Return what the run trains, from the checkpoint that it goes on from, if there is one."""

    @abstractmethod
    def ready(self, batch: Batch, number: int) -> Pass:
        """Return a batch with all that forward pass `number` of the run takes beside it."""

    def own_callbacks(self) -> list[Callback]:
        """Return what is told of the run beside the logs of every run."""
        return []

    def places(self) -> dict[str, str | None]:
        """Return the options that say what the run reads."""
        return {"data": self.source.place}

    def checked(self) -> dict[str, Any]:
        """Return what else a checkpoint says of the data."""
        return {}

    def end_epoch(self, epoch: int, log: RunLog) -> None:
        """Do what is to be done after `epoch` epochs, in all processes."""
        return

    def epoch_ended(self) -> bool:
        """Return whether that is done after the last epoch of a run that goes on: a signal comes before it."""
        return True

    @abstractmethod
    def describe_task(self) -> tuple[str, str, list[str]]:
        """Return what is learned and what is read, for the first lines of a run, and further lines."""

    def run(self) -> int:
        """Train to the end of the recipe; returns and raises as `pretrain` does."""
        self.connect()
        self.processes.of_main(self._prepare_folder)
        try:
            return self._run()
        except (LogError, WorkersError) as error:
            stopped = TrainingStopped(f"step {self.step}: {error}, {self.last_good()}")
            stopped.elsewhere = getattr(error, "elsewhere", False)
            raise stopped from error
        except RuntimeError as error:
            if str(error).startswith(READER_DIED):  # torch raises it wherever the run is at that moment
                problem = f"step {self.step}: a process that reads images died ({str(error).strip()})"
                raise TrainingStopped(f"{problem}, {self.last_good()}. Fewer workers need less memory") from error
            if self.processes.lost(error):
                problem = f"step {self.step}: {self.processes.said_of_loss(error)}"
                raise TrainingStopped(f"{problem}, {self.last_good()}") from error
            raise

    def connect(self) -> None:
        """Build the network, after all processes have agreed that they see the same data.

        Raises:
            InputError: they do not, or the network does not fit the recipe or the options.
        """
        self.processes.together(self._expect_same_data)
        self.learner = self.processes.together(self.make_learner)
        self.learner.connect(self.saved)
        self.saved = None

    def _expect_same_data(self) -> None:
        """Raise InputError unless all processes see the same files."""
        found = self.processes.gathered((self.fingerprint, len(self.source)))
        for rank, other in enumerate(found):
            if other != found[0]:
                problem = f"process {rank} sees {other[1]} {self.source.noun}s, others than process 0, {found[0][1]}"
                raise InputError("data", self.source.root, f"{problem}; expected the same on every machine")

    def _prepare_folder(self) -> None:
        try:
            self.folder.drop_leftovers()
            write_config(self.folder.folder, self.recipe, self.places())
        except OSError as error:
            raise InputError("output", self.folder.folder, f"cannot be written ({error})") from error

    def _run(self) -> int:
        with _caught_signals() as signals, RunLog(self.callbacks, self.told()) as log, self.batches() as batches:
            for line in [*self.describe(), *self.notes] if self.processes.main else []:
                log.say(line)
            if self.step and self.step % self.steps_per_epoch == 0 and not self.processes.of_main(self.epoch_ended):
                self.end_epoch(self.step // self.steps_per_epoch, log)
            records: list[StepRecord] = []
            while self.step < self.total_steps:
                record = self.train_step(batches, log)
                log.write(record)
                records.append(record)
                epoch, within = divmod(self.step, self.steps_per_epoch)
                if number := self.processes.largest(signals[0] if signals else 0):
                    self.save()
                    name = signal.Signals(number).name
                    log.say(f"{name}: saved step {self.step} in {self.folder.newest()}; --resume goes on")
                    return 128 + number
                if within == 0:
                    log.say(_epoch_line(epoch, self.recipe.epochs, records))
                    records.clear()
                if self.step % self.save_steps == 0 or self.step == self.total_steps:
                    self.save()
                if within == 0:
                    self.end_epoch(epoch, log)
            self._say_end(log)
        return 0

    def told(self) -> Run:
        """Return what callbacks are told at the start."""
        data = {"data": self.source.root, "images": len(self.source), "processes": self.processes.world}
        steps = {"step": self.step, "total_steps": self.total_steps, "images_per_step": self.recipe.effective_batch}
        return Run(self.folder.folder, **steps, device=self.learner.device, config=asdict(self.recipe) | data)

    def _say_end(self, log: RunLog) -> None:
        kinds = {"skipped {} unreadable {}s": self.unreadable, "found {} {}s with unusual values": self.unusual}
        for text, found in kinds.items():
            names = sorted(set().union(*self.processes.gathered([*found])))
            if names:
                more = ["..."] if len(names) > MOST_NAMED else []
                log.say(f"{text.format(len(names), self.source.noun)}: {', '.join(names[:MOST_NAMED] + more)}")
        if self.idle:
            log.say(f"{self.idle} steps without a value that counts in the loss changed no weight")
        log.say(f"done: {self.folder.newest()}")

    def batches(self) -> AbstractContextManager[Iterator[Batch]]:
        """Return a context with the batches that are still to come, of each this process's part."""
        start, pin_memory = self.step * self.recipe.grad_accum_steps, self.learner.device.type == "cuda"
        order = draws(self.recipe, self.source, self.processes.part, ranks=self.processes.world, start=start)
        return load_batches(self.crops, order, workers=self.workers, pin_memory=pin_memory)

    def train_step(self, batches: Iterator[Batch], log: RunLog) -> StepRecord:
        """Take one optimizer step over `grad_accum_steps` batches; no weight changes if no value in them counts.

        Raises:
            TrainingStopped: loss or gradient is not finite, or no image can be read any more; the parameters are as
                before the step.
        """
        recipe, start, waited = self.recipe, time.perf_counter(), 0.0

        def passes() -> Iterator[Pass]:
            nonlocal waited
            for number in range(recipe.grad_accum_steps):
                begun = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - begun
                self._note_unreadable(batch, log)
                yield self.ready(batch, self.step * recipe.grad_accum_steps + number)

        losses, counts = self.learner.backward(passes())
        norm = self.learner.gradient_norm()
        # This waits for the device once. It stands before the update, so that a bad step never reaches a checkpoint.
        known = torch.cat([whole(norm)[None], losses, counts]).tolist()
        grad_norm, mean_loss, each, there = known[0], known[1], known[2 : 1 + len(losses)], known[1 + len(losses) :]
        self.processes.together(lambda: self._expect_finite(mean_loss, grad_norm))
        lr = self._learning_rate()
        self.learner.update(lr if any(there) else 0.0, norm)
        self.step += 1
        if not any(there):
            self._note_idle(log)
        seconds = time.perf_counter() - start
        speeds, waits = self.processes.numbers(recipe.effective_batch / self.processes.world / seconds, waited)
        epoch = self.step / self.steps_per_epoch
        named = {name: loss for name, loss, count in zip(recipe.targets or (), each, there, strict=False) if count}
        return StepRecord(self.step, epoch, mean_loss, lr, grad_norm, sum(speeds), speeds, waits, named)

    def _note_idle(self, log: RunLog) -> None:
        """Say that nothing could be learned in a step."""
        self.idle += 1
        if self.idle <= self.most_named:
            what = f"no value of its {self.source.noun}s counts in the loss, so no weight changes"
            log.say(f"step {self.step}: {what}{self._rest(self.idle)}")

    def _rest(self, number: int) -> str:
        """Return what is added to the last line of its kind."""
        return "; further ones are only counted" if number == self.most_named else ""

    def _expect_finite(self, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"step {self.step + 1}: loss is {loss}, gradient norm {grad_norm}; stopped before the update"
            help = "A lower --base-lr, --clip-grad 1 or --dtype float32 may help"
            raise TrainingStopped(f"{what}, {self.last_good()}. {help}")

    def _learning_rate(self) -> float:
        recipe, first = self.recipe, self.recipe.first_epoch * self.steps_per_epoch
        warmup_steps, total_steps = recipe.warmup * self.steps_per_epoch, self.total_steps - first
        rates = {"peak": recipe.peak_lr, "least": recipe.min_lr}
        return learning_rate(self.step - first, warmup_steps=warmup_steps, total_steps=total_steps, **rates)

    def _note_unreadable(self, batch: Batch, log: RunLog) -> None:
        """Name the files that were skipped or are unusual, or stop all processes if one of them can read none."""
        self.processes.together(lambda: self._expect_images(batch))
        kinds = (SKIPPED, self.unreadable, batch.unreadable), (UNUSUAL, self.unusual, batch.unusual)
        for begins, known, found in kinds:
            for name in sorted(found.keys() - known.keys()):
                known[name] = found[name]
                if len(known) <= self.most_named:
                    log.say(f"{begins} {self.source.noun} {name} ({found[name]}){self._rest(len(known))}")

    def _expect_images(self, batch: Batch) -> None:
        if batch.problem is not None:
            raise TrainingStopped(f"step {self.step + 1}: {batch.problem}, {self.last_good()}")

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            TrainingStopped: it could not be written; the ones before it are whole.
        """
        self.processes.together(self._save)

    def _save(self) -> None:
        try:
            if self.options.shard:
                self.folder.save_sharded(self.state(), self.processes)
            elif self.processes.main:
                self.folder.save(self.state())
        except OSError as error:
            problem = f"step {self.step}: the checkpoint could not be saved ({error})"
            raise TrainingStopped(f"{problem}, {self.last_good()}") from error

    def describe(self) -> list[str]:
        """Return the first lines of a run: model, data, and the folder that it writes to."""
        r = self.recipe
        learned, read, others = self.describe_task()
        millions = sum(p.numel() for p in self.learner.model.parameters()) / 1e6
        repeats = f" x {r.epoch_repeats}" if r.epoch_repeats > 1 else ""
        accumulated = f" x {r.grad_accum_steps}" if r.grad_accum_steps > 1 else ""
        start = f", going on from step {self.step}" if self.step else ""
        return [
            f"{r.called} {r.model}, {millions:.1f} M parameters, {r.dtype} on {self.learner.device}, {learned}",
            f"{len(self.source)} {self.source.noun}s{repeats} {read} from {self.source.root}",
            f"batch {r.batch_size}{accumulated}, steps per epoch {self.steps_per_epoch}, epochs {r.epochs}",
            f"peak learning rate {r.peak_lr:.3g}, warm-up epochs {r.warmup:g}",
            f"writes to {self.folder.folder}{start}",
            *others,
            *self._processes(),
            *self._hints(),
        ]

    def _processes(self) -> list[str]:
        """Return how many processes there are, and what changes if a run goes on with another number of them."""
        world, depends = self.processes.world, self.learner.depends_on_processes()
        lines = [] if world == 1 else [self.learner.describe()]
        if self.step and self.written_by != world:
            images, losses = "the same images and masks", "losses equal to rounding"
            if depends:
                losses = f"losses change by {', '.join(depends)}"
            if self.source.ordered_by_rank:
                images, losses = "images in another order", "the losses of another run from here on"
            here = "1 process goes" if world == 1 else f"{world} processes go"
            lines.append(f"{here} on from a checkpoint of {self.written_by}: {images}, {losses}")
        return lines

    def _hints(self) -> list[str]:
        """Return what the user should know."""
        hints = []
        if self.step == self.total_steps:
            hints.append("the run is finished" + ("; --resume --extend EPOCHS trains it on" if self.extends else ""))
        if self.options.compile and self.step < self.total_steps:
            hints.append("torch.compile runs in the first step, which takes a minute or more")
        return hints

    def last_good(self) -> str:
        """Return which checkpoint is the last good one, for an error."""
        newest, folder = self.folder.newest(), self.folder.folder
        if not folder.is_dir():
            return "no checkpoint is left"
        return f"last good checkpoint: {newest}" if newest else "no checkpoint yet"


def default_workers() -> int:
    """Return one process per two cores that this process may use, at most 8; the other cores compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
    return max(1, min(8, cores // processes // 2))


def _epoch_line(epoch: int, epochs: int, records: list[StepRecord]) -> str:
    counted = [r for r in records if not r.idle] or records
    loss, speed = fmean(r.loss for r in counted), harmonic_mean([r.images_per_s for r in records])
    done = f"epoch {epoch:{len(str(epochs))}}/{epochs}"
    return f"{done}  loss {loss:.4f}  lr {records[-1].lr:.2e}  {speed:.1f} images/s"


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the current step is finished and saved; a second one kills."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for stop, handler in previous.items():
            signal.signal(stop, handler)

    for stop in (signal.SIGINT, signal.SIGTERM):
        previous[stop] = signal.signal(stop, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
