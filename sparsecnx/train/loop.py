"""The pretraining loop: start or resume a run, step, log, save, and stop on a signal."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from types import FrameType
from typing import Any

import torch

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import CheckpointError, InputError, TrainingStopped
from sparsecnx.common.torch_files import has_checksums
from sparsecnx.geometry.masks import random_mask
from sparsecnx.models import SIZES
from sparsecnx.train import contents
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.contents import Contents, Data
from sparsecnx.train.data.crops import Batch, Crops, mix
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.loader import WorkersError, load_batches
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.data.source import Fingerprint, Source
from sparsecnx.train.lock import locked
from sparsecnx.train.log import LOG, LogError, RunLog, StepRecord
from sparsecnx.train.networks import build_model
from sparsecnx.train.options import Options
from sparsecnx.train.recipe import (
    BETAS,
    DEFAULTS,
    METHODS,
    Recipe,
    learning_rate,
    param_groups,
    small_data,
)

# Steps times the peak learning rate of a run that learns little. `make demo` has 0.7, the published runs have 600.
LEAST_TRAINING = 0.2


def pretrain(options: Options, given: Mapping[str, Any]) -> int:
    """Start or resume a run and train to its end.

    Args:
        options: data, output folder and device.
        given: recipe fields that the user chose; the others are the published ones, or those of the resumed run.

    Returns:
        0 if the run is complete; 128 + the number of the signal if Ctrl-C (130) or SIGTERM (143) stopped it. It saves
        a checkpoint first.

    Raises:
        InputError: an argument cannot work, or another run has the output folder; nothing was changed on disk.
        TrainingStopped: the loss is not finite, no image can be read any more, a reading process died, the output
            folder is gone, or a checkpoint or a log could not be written.
    """
    folder, resume = _place(options)
    with locked(folder.folder) as problem:
        notes = [] if problem is None else [f"cannot lock the output ({problem}): start no other run in it"]
        checkpoint = _checkpoint(folder, resume)
        if checkpoint is None:
            if options.extend is not None:
                raise InputError(
                    "extend", options.extend, f"there is no run in {folder.folder}; expected a finished one"
                )
            size = given.get("image_size")
            ndim = len(size) if isinstance(size, tuple) else None
            source = find_source(options.data, ndim)
            defaults = DEFAULTS.get(given.get("method", Recipe.method), {}) | source.defaults(given)
            if options.small_data:
                defaults |= small_data(len(source))
            recipe = Recipe(**{**defaults, **given})
            return Trainer(recipe, source, source.fingerprint(), folder, options, notes).run()

        saved = _read_resumed(checkpoint, given.get("model"))
        where = saved.data.folder if options.data is None else options.data
        recipe = saved.recipe
        if (code := recipe.transform) is not None and code != given.get("transform"):  # a file alone runs no code
            problem = f"its recipe names Python code, {code}, which runs only with --transform {code}"
            raise InputError("resume", checkpoint, problem)
        source = find_source(where, recipe.ndim, recipe.photographs)
        fingerprint = source.fingerprint()
        _expect_same_images(saved.data, source, fingerprint, "resume" if options.data is None else "data")
        if options.extend is not None:
            saved = saved._replace(recipe=_extended(saved, options.extend, given.get("warmup_epochs")))
        saved.recipe.refuse_change(given)
        if saved.data.sizes is None or saved.data.contents is None:
            notes.append(
                f"{checkpoint.name} is of an earlier version: changed images under the same names are not noticed"
            )
        if not has_checksums(checkpoint):
            notes.append(f"{checkpoint.name} holds no checksums: damage to it is not noticed")
        trainer = Trainer(saved.recipe, source, fingerprint, folder, options, notes)
        trainer.load(saved)
        return trainer.run()


def _extended(saved: Contents, epochs: int, warmup_epochs: float | None) -> Recipe:
    """Return the recipe of a finished run with so many more epochs, in which the schedule begins again."""
    recipe, last = saved.recipe, saved.recipe.steps_per_epoch(saved.data.images) * saved.recipe.epochs
    if saved.step < last:
        raise InputError(
            "extend", epochs, f"the run is at step {saved.step} of {last}; --resume without it finishes it"
        )
    if warmup_epochs is not None and not 0 <= warmup_epochs <= epochs:
        raise InputError("warmup_epochs", warmup_epochs, f"expected 0 to --extend, {epochs}")
    last_epoch = recipe.epochs + epochs
    return replace(recipe, first_epoch=recipe.epochs, epochs=last_epoch, warmup_epochs=warmup_epochs)


def _place(options: Options) -> tuple[CheckpointFolder, Path | str | None]:
    """Return the folder of the run, and the checkpoint to go on from, "newest", "auto" or None."""
    resume = options.resume if options.resume in (None, "auto", "newest") else Path(str(options.resume))
    beside = resume.parent if isinstance(resume, Path) else "runs/pretrain"
    output = Path(options.output or beside)
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError("output", output, "not a folder; expected one, or a name for a new one")
    return CheckpointFolder(output, options.keep), resume


def _checkpoint(folder: CheckpointFolder, resume: Path | str | None) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run; refuse to write over another run."""
    newest, output = folder.newest(), folder.folder
    if isinstance(resume, Path):
        if newest is not None and resume.resolve() != newest.resolve() and resume.exists():
            problem = f"{output} goes on to {newest.name}; resume that, or name another output"
            raise InputError("resume", resume, problem)
        return resume
    if resume is None and (newest is not None or os.path.lexists(output / LOG)):
        raise InputError("output", output, "holds a run already; --resume goes on with it, or name another folder")
    if resume == "newest" and newest is None:
        problem = "holds no checkpoint to resume; leave out --resume for a new run, or --resume auto for either"
        raise InputError("output", output, problem)
    return newest


def _read_resumed(path: Path, model: str | None) -> Contents:
    try:
        return contents.load(path, model)
    except CheckpointError as error:
        others = [p.name for p in CheckpointFolder(path.parent).all() if p.resolve() != path.resolve()]
        hint = f"; there are also {', '.join(others)}" if others else ""
        raise InputError("resume", path, f"{error}{hint}") from error


def _expect_same_images(data: Data, source: Source, found: Fingerprint, argument: str) -> None:
    """Raise InputError that blames `argument` unless the images are those of a checkpoint."""
    problem = None
    if data.fingerprint != found.names:
        count = f"{len(source)} {source.noun} files"
        problem = f"{count}, not the {data.images} that the run was started with (or under other names)"
    elif data.sizes not in (None, found.sizes):
        problem = "the same names, but files of other sizes than the run was started with"
    elif data.contents not in (None, found.contents):
        problem = "the same names and sizes, but files with other contents than the run was started with"
    if problem is not None:
        where = "the installed photographs" if source.place is None else source.root
        raise InputError(argument, where, f"{problem}; the losses could not continue")


class Trainer:
    """One pretraining run.

    Args:
        recipe: decides the losses.
        source: what it reads.
        fingerprint: its hashes.
        folder: folder of the checkpoints and logs.
        options: only device, workers, compile, grad_checkpointing and save_every are read.
        notes: lines to print when the run begins.

    Raises:
        InputError: an epoch is smaller than the effective batch, nothing can be read, or the data do not fit the
            recipe, see `Source.check`.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        fingerprint: Fingerprint,
        folder: CheckpointFolder,
        options: Options,
        notes: Sequence[str] = (),
    ) -> None:
        self.recipe, self.source, self.fingerprint = recipe, source, fingerprint
        self.folder, self.options, self.notes = folder, options, notes
        source.check(recipe)
        self.crops = Crops(source, recipe)
        self.crops.read(0)  # raises unless there is a readable image
        self.steps_per_epoch = recipe.steps_per_epoch(len(source))
        self.total_steps = self.steps_per_epoch * recipe.epochs
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(automatic if options.device == "auto" else options.device)
        self.workers = default_workers() if options.workers is None else options.workers

        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe).to(self.device)
        if options.grad_checkpointing:
            try:
                self.model.set_grad_checkpointing()
            except (TypeError, AssertionError) as error:  # timm's networks that have none assert
                raise InputError("grad_checkpointing", True, f"{recipe.model} has none ({error})") from error
        self.forward = torch.compile(self.model) if options.compile else self.model
        groups = param_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=BETAS, fused=True)
        self.step = 0
        self.unreadable: dict[str, str] = {}

    def load(self, saved: Contents) -> None:
        """Take model, optimizer and step from a checkpoint."""
        self.model.load_state_dict(saved.model)
        # The rest of AdamW's state is the recipe's, so nothing else in the file has a say in it.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        self.step = saved.step

    def state(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, see `checkpoint.read`.

        It needs no state of a generator: every random choice is a function of the seed and the step, see data/crops.py.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "recipe": asdict(self.recipe),
            "data": {
                "folder": self.source.place,
                "images": len(self.source),
                "fingerprint": self.fingerprint.names,
                "sizes": self.fingerprint.sizes,
                "contents": self.fingerprint.contents,
            },
        }

    def run(self) -> int:
        """Train to the end of the recipe; returns and raises as `pretrain` does."""
        try:
            self.folder.drop_leftovers()
        except OSError as error:
            raise InputError("output", self.folder.folder, f"cannot be written ({error})") from error
        try:
            return self._run()
        except (LogError, WorkersError) as error:
            raise TrainingStopped(f"step {self.step}: {error}, {self._last_good()}") from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is at that moment
                raise
            problem = f"step {self.step}: a process that reads images died ({str(error).strip()})"
            raise TrainingStopped(f"{problem}, {self._last_good()}. Fewer workers need less memory") from error

    def _run(self) -> int:
        steps = {"step": self.step, "total_steps": self.total_steps, "images_per_step": self.recipe.effective_batch}
        with _caught_signals() as signals, RunLog(self.folder.folder, **steps) as log, self.batches() as batches:
            for line in [*self.describe(), *self.notes]:
                log.say(line)
            records: list[StepRecord] = []
            while self.step < self.total_steps:
                record = self.train_step(batches, log)
                log.write(record)
                records.append(record)
                epoch, within = divmod(self.step, self.steps_per_epoch)
                if signals:
                    self.save()
                    name = signal.Signals(signals[0]).name
                    log.say(f"{name}: saved step {self.step} in {self.folder.newest()}; --resume goes on")
                    return 128 + signals[0]
                if within == 0:
                    log.say(_epoch_line(epoch, self.recipe.epochs, records))
                    records.clear()
                    if epoch % self.options.save_every == 0 or self.step == self.total_steps:
                        self.save()
            if self.unreadable:
                names = ", ".join(sorted(self.unreadable))
                log.say(f"skipped {len(self.unreadable)} unreadable {self.source.noun}s: {names}")
            log.say(f"done: {self.folder.newest()}")
        return 0

    def batches(self) -> AbstractContextManager[Iterator[Batch]]:
        """Return a context with the batches that are still to come."""
        start, pin_memory = self.step * self.recipe.grad_accum_steps, self.device.type == "cuda"
        return load_batches(self.crops, self.recipe, start=start, workers=self.workers, pin_memory=pin_memory)

    def train_step(self, batches: Iterator[Batch], log: RunLog) -> StepRecord:
        """Take one optimizer step over `grad_accum_steps` batches.

        Raises:
            TrainingStopped: loss or gradient is not finite, or no image can be read any more; the parameters are as
                before the step.
        """
        recipe, start = self.recipe, time.perf_counter()
        warmup_steps, first = recipe.warmup * self.steps_per_epoch, recipe.first_epoch * self.steps_per_epoch
        total_steps = self.total_steps - first
        lr = learning_rate(self.step - first, peak=recipe.peak_lr, warmup_steps=warmup_steps, total_steps=total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.optimizer.zero_grad()
        losses = []
        for i in range(recipe.grad_accum_steps):
            batch = next(batches)
            if batch.problem is not None:
                raise TrainingStopped(f"step {self.step + 1}: {batch.problem}, {self._last_good()}")
            for name, reason in batch.unreadable.items():
                if name not in self.unreadable:
                    log.say(f"skipped unreadable {self.source.noun} {name} ({reason})")
            self.unreadable |= batch.unreadable
            loss = self._loss(batch.images, self.step * recipe.grad_accum_steps + i)
            (loss / recipe.grad_accum_steps).backward()
            losses.append(loss.detach())

        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # This waits for the device once. It stands before the update, so that a bad step never reaches a checkpoint.
        mean_loss, grad_norm = torch.stack([torch.stack(losses).mean(), norm]).tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            what = f"step {self.step + 1}: loss is {mean_loss}, gradient norm {grad_norm}; stopped before the update"
            help = "A lower --base-lr, --clip-grad 1 or --dtype float32 may help"
            raise TrainingStopped(f"{what}, {self._last_good()}. {help}")
        if recipe.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), recipe.clip_grad, norm)
        self.optimizer.step()
        self.step += 1
        speed = recipe.effective_batch / (time.perf_counter() - start)
        return StepRecord(self.step, self.step / self.steps_per_epoch, mean_loss, lr, grad_norm, speed)

    def _loss(self, images: torch.Tensor, forward_pass: int) -> torch.Tensor:
        """Return the loss of one batch, with a mask that depends on the seed and the number of the forward pass."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(mix(recipe.seed, "mask", forward_pass))
        mask = random_mask(len(images), recipe.grid, recipe.mask_ratio, generator=generator)
        images = normalize(images.to(self.device, non_blocking=True))
        dtype = DTYPES[recipe.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss: torch.Tensor = self.forward(images, mask=mask.to(self.device), visible=recipe.visible)[0]
        return loss

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            TrainingStopped: it could not be written; the ones before it are whole.
        """
        try:
            self.folder.save(self.state())
        except OSError as error:
            problem = f"step {self.step}: the checkpoint could not be saved ({error})"
            raise TrainingStopped(f"{problem}, {self._last_good()}") from error

    def describe(self) -> list[str]:
        """Return the first lines of a run: model, data, and the folder that it writes to."""
        r = self.recipe
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        repeats = f" x {r.epoch_repeats}" if r.epoch_repeats > 1 else ""
        accumulated = f" x {r.grad_accum_steps}" if r.grad_accum_steps > 1 else ""
        grn = f", GRN per {r.grn_scope}" if r.model in SIZES else ""
        start = f", going on from step {self.step}" if self.step else ""
        return [
            f"{METHODS[r.method]} {r.model}, {millions:.1f} M parameters, {r.dtype} on {self.device}, "
            f"mask ratio {r.mask_ratio:g}",
            f"{len(self.source)} {self.source.noun}s{repeats} {self._crops()} from {self.source.root}",
            f"batch {r.batch_size}{accumulated}, steps per epoch {self.steps_per_epoch}, epochs {r.epochs}",
            f"peak learning rate {r.peak_lr:.3g}, warm-up epochs {r.warmup:g}{grn}",
            f"writes to {self.folder.folder}{start}",
            *self._hints(),
        ]

    def _crops(self) -> str:
        """Return what is cut out of the data, for the first lines of a run."""
        r = self.recipe
        if r.photographs and r.patch_size == Recipe.patch_size:
            return f"of {r.pixels} px"
        size, patch = ("x".join(map(str, sides)) for sides in (r.size, r.patch))
        if r.photographs:
            return f"of {size} px in patches of {patch}"
        return f"of {', '.join(self.source.describe(r))}, crops of {size} in patches of {patch},"

    def _hints(self) -> list[str]:
        """Return what the user of a small data set should know."""
        r, hints = self.recipe, []
        first = r.first_epoch * self.steps_per_epoch
        steps = self.total_steps - first
        if self.step == self.total_steps:
            hints.append("the run is finished; --extend EPOCHS trains it on")
        elif self.step == first and steps * r.peak_lr < LEAST_TRAINING:
            problem = f"hint: {steps} steps at a learning rate of at most {r.peak_lr:.2g} hardly train a network"
            small = self.options.small_data or first
            remedy = "more --epochs or --epoch-repeats help" if small else "--small-data is a recipe for few images"
            hints.append(f"{problem}; {remedy}")
        if self.options.compile and self.step < self.total_steps:
            hints.append("torch.compile runs in the first step, which takes a minute or more")
        return hints

    def _last_good(self) -> str:
        newest, folder = self.folder.newest(), self.folder.folder
        if not folder.is_dir():
            return "no checkpoint is left"
        return f"last good checkpoint: {newest}" if newest else "no checkpoint yet"


def default_workers() -> int:
    """Return one process per two cores that this process may use, at most 8; the other cores compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def _epoch_line(epoch: int, epochs: int, records: list[StepRecord]) -> str:
    loss, speed = fmean(r.loss for r in records), harmonic_mean([r.images_per_s for r in records])
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
