"""The pretraining loop: start or resume a run, step, log, save, and stop on a signal."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from types import FrameType
from typing import Any

import torch

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import CheckpointError, InputError, TrainingStopped
from sparsecnx.geometry.masks import random_mask
from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.data import (
    PHOTOGRAPH_REPEATS,
    Batch,
    Crops,
    ImageSet,
    find_images,
    load_batches,
    mix,
    normalize,
    wheel_photographs,
)
from sparsecnx.train.log import LOG, LogError, RunLog, StepRecord
from sparsecnx.train.recipe import BETAS, Recipe, build_model, learning_rate, param_groups


@dataclass(frozen=True)
class Options:
    """Data, output folder and device of a run; the recipe decides everything else.

    Attributes:
        data: folder of images; None for that of the resumed run, or for the photographs inside the wheels.
        output: folder of checkpoints and logs; None for that of the resumed checkpoint, or `runs/pretrain`.
        resume: a checkpoint; or "auto" for the newest in `output`, or a new run if there is none.
        device: auto, cpu or cuda.
        workers: processes that read images; None for one per two cores, at most 8.
        compile: run the model through `torch.compile`.
        save_every: epochs between checkpoints.
        keep: checkpoints kept.

    Raises:
        InputError: a field is out of range, or there is no CUDA device.
    """

    data: str | None = None
    output: str | None = None
    resume: str | None = None
    device: str = "auto"
    workers: int | None = None
    compile: bool = False
    save_every: int = 1
    keep: int = 3

    def __post_init__(self) -> None:
        for field in ("save_every", "keep"):
            if getattr(self, field) < 1:
                raise InputError(field, getattr(self, field), "expected 1 or more")
        if self.workers is not None and self.workers < 0:
            raise InputError("workers", self.workers, "expected 0 or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError("device", self.device, "expected auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device", "cuda", "this torch sees no CUDA device; expected auto or cpu")


def pretrain(options: Options, given: Mapping[str, Any]) -> int:
    """Start or resume a run and train to its end.

    Args:
        options: data, output folder and device.
        given: recipe fields that the user chose; the others are the published ones, or those of the resumed run.

    Returns:
        0 if the run is complete; 128 + the number of the signal if Ctrl-C (130) or SIGTERM (143) stopped it. It saves
        a checkpoint first.

    Raises:
        InputError: an argument cannot work; nothing was changed on disk.
        TrainingStopped: the loss is not finite, no image can be read any more, or a checkpoint or a log could not be
            written.
    """
    folder, source = _place(options)
    if source is None:
        images = wheel_photographs() if options.data is None else find_images(options.data)
        repeats = PHOTOGRAPH_REPEATS if options.data is None else 1
        return Trainer(Recipe(**{"epoch_repeats": repeats, **given}), images, folder, options).run()

    state = _read_resumed(source)
    saved = state["data"]
    where = saved["folder"] if options.data is None else options.data
    images = wheel_photographs() if where is None else find_images(where)
    try:
        recipe = Recipe.continued(state["recipe"], given)
    except TypeError as error:
        raise InputError("resume", source, f"its recipe was written by another version ({error})") from error
    if saved["fingerprint"] != images.fingerprint():
        argument, value = ("resume" if options.data is None else "data"), where or "the installed photographs"
        started = f"not the {saved['images']} that the run was started with (or under other names)"
        problem = f"{len(images.names)} image files, {started}; the losses could not continue"
        raise InputError(argument, value, problem)
    trainer = Trainer(recipe, images, folder, options)
    try:
        trainer.load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError("resume", source, f"its weights do not fit {recipe.model} ({error})") from error
    return trainer.run()


def _place(options: Options) -> tuple[CheckpointFolder, Path | None]:
    """Return the folder of the run and the checkpoint to go on from; refuse to write over another run."""
    resume = None if options.resume in (None, "auto") else Path(str(options.resume))
    output = Path(options.output or (resume.parent if resume else "runs/pretrain"))
    folder = CheckpointFolder(output, options.keep)
    if output.exists() and not output.is_dir():
        raise InputError("output", output, "a file; expected a folder, or a name for a new one")
    newest = folder.newest()
    if options.resume == "auto":
        return folder, newest
    if resume is not None:
        if newest is not None and resume.resolve() != newest.resolve() and resume.exists():
            problem = f"{output} goes on to {newest.name}; resume that, or name another output"
            raise InputError("resume", resume, problem)
        return folder, resume
    if newest is not None or (output / LOG).exists():
        raise InputError("output", output, "holds a run already; resume it (resume auto), or name another folder")
    return folder, None


def _read_resumed(path: Path) -> dict[str, Any]:
    try:
        return checkpoint.read(path)
    except CheckpointError as error:
        others = [p.name for p in CheckpointFolder(path.parent).all() if p.resolve() != path.resolve()]
        hint = f"; there are also {', '.join(others)}" if others else ""
        raise InputError("resume", path, f"{error}{hint}") from error


class Trainer:
    """One pretraining run.

    Args:
        recipe: decides the losses.
        images: the data set.
        folder: folder of the checkpoints and logs.
        options: only device, workers, compile and save_every are read.

    Raises:
        InputError: an epoch is smaller than the effective batch, or no image can be read.
    """

    def __init__(self, recipe: Recipe, images: ImageSet, folder: CheckpointFolder, options: Options) -> None:
        self.recipe, self.images, self.folder, self.options = recipe, images, folder, options
        self.crops = Crops(images, recipe.image_size)
        self.crops.read(0)  # raises unless there is a readable image
        self.steps_per_epoch = recipe.steps_per_epoch(len(images.names))
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.workers = default_workers() if options.workers is None else options.workers

        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe).to(self.device)
        self.forward = torch.compile(self.model) if options.compile else self.model
        groups = param_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=BETAS, fused=True)
        self.step = 0
        self.unreadable: dict[str, str] = {}

    def load(self, state: dict[str, Any]) -> None:
        """Take model, optimizer and step from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def state(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, see `checkpoint.read`.

        It needs no state of a generator: every random choice is a function of the seed and the step, see data.py.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "recipe": asdict(self.recipe),
            "data": {
                "folder": None if self.images.small else os.path.abspath(self.images.root),
                "images": len(self.images.names),
                "fingerprint": self.images.fingerprint(),
            },
        }

    def run(self) -> int:
        """Train to the end of the recipe; returns and raises as `pretrain` does."""
        folder = self.folder.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder.drop_leftovers()
        except OSError as error:
            raise InputError("output", folder, f"cannot be written ({error})") from error
        try:
            return self._run()
        except LogError as error:
            raise TrainingStopped(f"step {self.step}: {error}, {self._last_good()}") from error

    def _run(self) -> int:
        steps = {"step": self.step, "total_steps": self.total_steps, "images_per_step": self.recipe.effective_batch}
        with _caught_signals() as signals, RunLog(self.folder.folder, **steps) as log:
            for line in self.describe():
                log.say(line)
            records: list[StepRecord] = []
            batches = iter(self.batches())
            while self.step < self.total_steps:
                record = self.train_step(batches, log)
                log.write(record)
                records.append(record)
                epoch, within = divmod(self.step, self.steps_per_epoch)
                if signals:
                    self.save()
                    name = signal.Signals(signals[0]).name
                    log.say(f"{name}: saved step {self.step} in {self.folder.newest()}; resume goes on")
                    return 128 + signals[0]
                if within == 0:
                    log.say(_epoch_line(epoch, self.recipe.epochs, records))
                    records.clear()
                    if epoch % self.options.save_every == 0 or self.step == self.total_steps:
                        self.save()
            if self.unreadable:
                log.say(f"skipped {len(self.unreadable)} unreadable images: {', '.join(sorted(self.unreadable))}")
            log.say(f"done: {self.folder.newest()}")
        return 0

    def batches(self) -> Iterator[Batch]:
        """Return the batches that are still to come."""
        start, pin_memory = self.step * self.recipe.grad_accum_steps, self.device.type == "cuda"
        return iter(load_batches(self.crops, self.recipe, start=start, workers=self.workers, pin_memory=pin_memory))

    def train_step(self, batches: Iterator[Batch], log: RunLog) -> StepRecord:
        """Take one optimizer step over `grad_accum_steps` batches.

        Raises:
            TrainingStopped: loss or gradient is not finite, or no image can be read any more; the parameters are as
                before the step.
        """
        recipe, start = self.recipe, time.perf_counter()
        warmup_steps = recipe.warmup * self.steps_per_epoch
        lr = learning_rate(self.step, peak=recipe.peak_lr, warmup_steps=warmup_steps, total_steps=self.total_steps)
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
                    log.say(f"skipped unreadable image {name} ({reason})")
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
            help = "A lower base_lr, clip_grad 1 or dtype float32 may help"
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
        start = f", going on from step {self.step}" if self.step else ""
        return [
            f"FCMAE {r.model}, {millions:.1f} M parameters, {r.dtype} on {self.device}, mask ratio {r.mask_ratio:g}",
            f"{len(self.images.names)} images{repeats} of {r.image_size} px from {self.images.root}, batch "
            f"{r.batch_size}{accumulated}, steps per epoch {self.steps_per_epoch}, epochs {r.epochs}",
            f"peak learning rate {r.peak_lr:.3g}, warm-up epochs {r.warmup:g}; writes to {self.folder.folder}{start}",
        ]

    def _last_good(self) -> str:
        newest = self.folder.newest()
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
