"""Checkpoints that are whole or not there.

    runs/demo/checkpoint-00000540.pt     state after 540 optimizer steps; the newest K are kept
    runs/demo/last.pt                    link to the newest

A file is written under another name in the same folder, forced to disk, and renamed: a full disk or a kill
at any moment leaves the previous checkpoint as it was. Files load with `weights_only=True`: no code in them
runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import stat
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

LAST = "last.pt"
_NAME = re.compile(r"checkpoint-(\d+)\.pt")
_PARTS = {"model", "optimizer", "step", "epoch", "recipe", "data"}
# What torch.save began with before it wrote zip files.
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_ALLOWING = threading.Lock()


class CheckpointError(Exception):
    """A file that is no whole checkpoint; the message says why."""


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """Checkpoints by step, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name[len("checkpoint-") : -len(".pt")]))

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, None where there is none."""
        return next(reversed(self.all()), None)

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `state["step"]`, point `last.pt` at it, drop old ones.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"checkpoint-{state['step']:08d}.pt"
        write(path, state)
        link = self.folder / f".{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.folder / LAST)
        for old in self.all()[: -self.keep]:
            old.unlink()
        _sync_folder(self.folder)
        return path

    def drop_leftovers(self) -> None:
        """Remove half-written files of a run that was killed while saving."""
        for leftover in [*self.folder.glob(".checkpoint-*.pt.tmp"), self.folder / f".{LAST}.tmp"]:
            leftover.unlink(missing_ok=True)


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint file whole or not at all.

    Raises:
        OSError: no space, no permission, or another failure of the file system; `path` is as before.
    """
    with whole(path) as (file,):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer wraps the file's own error
            raise OSError(f"{file.name}: {error.__context__ or error}") from error


@contextlib.contextmanager
def whole(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write that become `paths` when all of all of them is on disk, and are gone after an error.

    The body writes through them, or lets another library put a file of its own under their names.

    Raises:
        OSError: a failure of the file system; `paths` are as before.
    """
    for path in paths:
        if path.is_dir():  # of several the others would be renamed before the system refuses this one
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporaries = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(temporary, "wb")) for temporary in temporaries]
            yield files
            for file in files:
                _sync_file(file)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `sparsecnx pretrain` onto the CPU.

    Returns:
        `model`, `optimizer`: state dicts; `step`: optimizer steps done; `epoch`: the same in epochs;
        `recipe`: the fields of `Recipe`; `data`: where the images were, how many, and their fingerprint.

    Raises:
        CheckpointError: no such file, truncated, damaged, or not a checkpoint of `sparsecnx pretrain`.
    """
    state = load(path)
    missing = sorted(_PARTS - state.keys() if isinstance(state, dict) else _PARTS)
    if missing:
        raise CheckpointError(f"not a checkpoint of sparsecnx pretrain: it lacks {', '.join(missing)}")
    return state


def load(path: str | Path, allowed: Sequence[type] = (), mmap: bool = False) -> Any:
    """Read any file of `torch.save` onto the CPU, without running code in it.

    Args:
        path: the file.
        allowed: classes that it may hold beside tensors and plain values.
        mmap: leave the tensors in the file, mapped into memory, until somebody reads them, where its kind allows that.
            The file may be renamed, replaced or deleted meanwhile, but not written into.

    Raises:
        CheckpointError: no such file, truncated, damaged, or with more in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("a folder; expected a file in it" if path.exists() else "no such file")
    try:
        with _allow(allowed):
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _can_be_mapped(path))
            with open(path, "rb") as file:  # the name alone would make torch take it for a file of safetensors
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes make the unpickler raise has no end
        # torch puts advice to load the file without safety around what the unpickler said.
        said = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        reason = next(iter(str(said or error).splitlines()), "") or type(error).__name__
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", reason)
        if said is not None and refused and is_torch_file(path):
            raise CheckpointError(
                f"not a checkpoint: it holds more than tensors and plain values, first {refused[1]}"
            ) from error
        raise CheckpointError(f"truncated or damaged, or not a checkpoint ({reason})") from error


def is_torch_file(path: Path) -> bool:
    """Whether a file is of the kind that `torch.save` writes, whatever its name."""
    with open(path, "rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY or zipfile.is_zipfile(file)


def _can_be_mapped(path: Path) -> bool:
    """Tensors lie in the file as in memory: in a zip file, and not compressed by whoever packed it again."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


@contextlib.contextmanager
def _allow(classes: Sequence[type]) -> Iterator[None]:
    """Let the unpickler build classes, and leave torch's list of them, which is the whole process's, as it was."""
    with _ALLOWING:
        present = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([added for added in classes if added not in present]):
            yield


def _sync_file(file: BinaryIO) -> None:
    """Force what has the name of `file` to disk, with the mode that `file` was opened with.

    That is `file` itself, or what a library that writes a file of its own renamed over it.
    """
    file.flush()
    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    descriptor = os.open(file.name, os.O_RDONLY)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
