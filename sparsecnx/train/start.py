"""The beginning of a run: a new one, or one that goes on from a checkpoint, in one process or in several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsecnx.common.errors import CheckpointError, InputError, TrainingStopped
from sparsecnx.common.torch_files import has_checksums
from sparsecnx.train import contents
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.code import is_code
from sparsecnx.train.contents import PRETRAINING, Contents, Data, Kind
from sparsecnx.train.data.address import trusted
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.source import Fingerprint, Source
from sparsecnx.train.lock import locked
from sparsecnx.train.log import LOG
from sparsecnx.train.loop import Trainer
from sparsecnx.train.options import Options
from sparsecnx.train.pretraining import Pretraining
from sparsecnx.train.processes import Processes, joined
from sparsecnx.train.recipe import DEFAULTS, Recipe, small_data


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
    return run(Start, options, given, "runs/pretrain")


def run(kind: type[Start], options: Any, given: Mapping[str, Any], folder_of_runs: str) -> int:
    """Start or resume a run and train to its end; arguments, result and errors are those of `pretrain`.

    Args:
        kind: of the run.
        options: see `pretrain`.
        given: see `pretrain`.
        folder_of_runs: where it lies if no output is named.
    """
    folder, resume = _place(options, folder_of_runs)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(options.device))
        problem = processes.of_main(lambda: stack.enter_context(locked(folder.folder)))
        checkpoint = processes.of_main(lambda: _checkpoint(folder, resume))
        start = kind(options, given, folder, processes)
        try:
            trainer = processes.together(lambda: start.new() if checkpoint is None else start.resumed(checkpoint))
            if problem is not None:
                trainer.notes.append(f"cannot lock the output ({problem}): start no other run in it")
            return trainer.run()
        except RuntimeError as error:
            if isinstance(error, TrainingStopped) or not processes.lost(error):
                raise
            raise TrainingStopped(processes.said_of_loss(error)) from error


@dataclass(frozen=True)
class Start:
    """What a run begins with in each of its processes, see `pretrain`."""

    options: Any
    given: Mapping[str, Any]
    folder: CheckpointFolder
    processes: Processes

    def expect_new(self) -> None:
        """Raise InputError if an option is for a run that is extended."""
        options, given = self.options, self.given
        if options.extend is not None:
            raise InputError(
                "extend", options.extend, f"there is no run in {self.folder.folder}; expected a finished one"
            )
        if given.get("first_epoch"):  # of the config.yaml of such a run
            alone = "remove it for a run with one schedule, or train so many epochs and then --extend"
            raise InputError("first_epoch", given["first_epoch"], f"the run was extended there; {alone}")

    def new(self) -> Trainer:
        """Return a new run."""
        options, given = self.options, self.given
        self.expect_new()
        if given.get("masks") is not None and "mask_ratio" in given:
            raise InputError("mask_ratio", given["mask_ratio"], "expected none, since --masks says what is masked")
        size = given.get("image_size")
        ndim = given.get("ndim", len(size) if isinstance(size, tuple) else None)
        source = find_source(options.data, ndim, pages=given.get("pages"), in_chans=given.get("in_chans"))
        defaults = DEFAULTS.get(given.get("method", Recipe.method), {}) | source.defaults(given)
        if options.small_data:
            defaults |= small_data(len(source))
        recipe = Recipe(**{**defaults, **given})
        notes = source.describe(recipe, given) if self.processes.main else []
        return Pretraining(recipe, source, source.fingerprint(), *self.place(), notes=notes)

    def resumed(self, checkpoint: Path) -> Trainer:
        """Return the run of a checkpoint."""
        notes: list[str] = []
        saved, where = self.read(checkpoint, PRETRAINING, notes)
        recipe = saved.recipe
        source = find_source(where, recipe.ndim, recipe.of_images, recipe.pages, recipe.in_chans)
        source.seen[:] = saved.data.seen or []
        fingerprint = source.fingerprint()
        saved = self.continued(saved, source, fingerprint)
        notes += source.describe(saved.recipe, None) if self.processes.main else []
        trainer = Pretraining(saved.recipe, source, fingerprint, *self.place(), saved=saved, notes=notes)
        if saved.data.masks not in (None, trainer.masks.checksum):
            raise InputError(
                "masks", saved.recipe.masks, "other masks than the run was started with; the losses could not continue"
            )
        return trainer

    def read(self, checkpoint: Path, kind: Kind, notes: list[str]) -> tuple[Contents, str | None]:
        """Return a checkpoint to go on from, and the data of its run; add what a user should know to `notes`."""
        saved = _read_resumed(checkpoint, self.given.get("model"), kind)
        where = trusted(saved.data.folder, self.options.data, "data", "resume", checkpoint)
        _expect_same_code(saved.recipe, self.given, checkpoint)
        if self.options.data is None and where != saved.data.folder:
            notes.append(f"data are {where}: a checkpoint alone neither chooses a cache nor downloads, --data does")
        if saved.data.sizes is None or saved.data.contents is None:
            notes.append(
                f"{checkpoint.name} is of an earlier version: changed images under the same names are not noticed"
            )
        if checkpoint.is_file() and not has_checksums(checkpoint):
            notes.append(f"{checkpoint.name} holds no checksums: damage to it is not noticed")
        return saved, where

    def continued(self, saved: Contents, source: Source, fingerprint: Fingerprint) -> Contents:
        """Return a checkpoint with the recipe that its run goes on with; refuse other data or fields."""
        _expect_same_images(saved.data, source, fingerprint, "resume" if self.options.data is None else "data")
        return saved._replace(recipe=_continued(saved, self.options, self.given))

    def place(self) -> tuple[CheckpointFolder, Any, Processes]:
        """Return where a run writes, its options and its processes."""
        return self.folder, self.options, self.processes


def _expect_same_code(recipe: Recipe, given: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise InputError if a recipe names Python code that the user did not name: a file alone runs no code."""
    for field in ("transform", "masks"):
        code = getattr(recipe, field)
        if is_code(code) and code != given.get(field):
            problem = f"its recipe names Python code, {code}, which runs only with --{field} {code}"
            raise InputError("resume", checkpoint, problem)


def _continued(saved: Contents, options: Options, given: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a run goes on with; refuse fields that it was not started with.

    With `--extend` the epochs may be given as they were before, and the warm-up is that of the extension.
    """
    recipe, given = saved.recipe, dict(given)
    if options.extend is None or _is_extended(recipe, options):
        continued = recipe
        if options.extend is not None and given.get("epochs") == recipe.first_epoch:
            given = {name: value for name, value in given.items() if name not in ("epochs", "first_epoch")}
    else:
        continued = _extended(saved, options.extend, given.pop("warmup_epochs", None))
    recipe.refuse_change(given)
    return continued


def _is_extended(recipe: Recipe, options: Options) -> bool:
    """Return whether `--resume auto` meets the extension that an earlier start of the same command began."""
    return options.resume == "auto" and 0 < recipe.first_epoch == recipe.epochs - (options.extend or 0)


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


def _place(options: Any, folder_of_runs: str) -> tuple[CheckpointFolder, Path | str | None]:
    """Return the folder of the run, and the checkpoint to go on from, "newest", "auto" or None."""
    resume = options.resume if options.resume in (None, "auto", "newest") else Path(str(options.resume))
    beside = resume.parent if isinstance(resume, Path) else folder_of_runs
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


def _read_resumed(path: Path, model: str | None, kind: Kind) -> Contents:
    try:
        return contents.load(path, model, kind)
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
