"""Files of `torch.save`: written whole or not at all, and read without running code in them."""

from __future__ import annotations

import contextlib
import pickle
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.common.inspection import LEGACY, MOST_BYTES, ZIP, check_holes, check_torch_file

_ALLOWING = threading.Lock()


def save_torch(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with `torch.save`, whole or not at all.

    Raises:
        OSError: no space, no permission, or another failure of the file system; `path` is as before.
    """
    with open_atomically(path) as (file,):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer wraps the file's own error
            raise OSError(f"{file.name}: {error.__context__ or error}") from error


def load_torch(path: str | Path, allowed: Sequence[type] = (), mmap: bool = False, max_bytes: int = MOST_BYTES) -> Any:
    """Read any file of `torch.save` onto the CPU, without running code in it.

    Args:
        path: the file.
        allowed: classes that the file may hold beside tensors and plain values.
        mmap: map the tensors into memory and read them when they are used, where the kind of file allows it. The file
            may be renamed, replaced or deleted meanwhile, but not written into.
        max_bytes: the most that a file may take in memory if that is more than it has: one that is compressed, has
            holes, or holds tensors that share their numbers.

    Raises:
        CheckpointError: there is no such file, it is truncated or damaged, it is larger than `max_bytes` in memory, or
            it holds other classes.
    """
    path = Path(path)
    if (problem := not_regular(path)) is not None:
        raise CheckpointError(problem)
    try:
        with _allow(allowed):
            check_holes(path, max_bytes)
            check_torch_file(path, max_bytes)
            if (damaged := _damaged_record(path)) is not None:
                raise CheckpointError(f"truncated or damaged: the checksum of its record {damaged} does not match")
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _can_be_mapped(path))
            with open(path, "rb") as file:  # by its name torch would take it for a file of safetensors
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make zipfile and the unpickler raise any kind of error
        # torch wraps the unpickler's message in advice to load the file without this safety.
        unpickling = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        reason = next(iter(str(unpickling or error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"truncated or damaged, or not a checkpoint ({reason})") from error


def is_torch_file(path: Path) -> bool:
    """Return whether `torch.save` writes files of this kind, whatever their name."""
    with open(path, "rb") as file:
        return file.read(len(LEGACY)).startswith((LEGACY, ZIP))


def has_checksums(path: Path) -> bool:
    """Return whether a file records checksums. One in torch's old format, or with torch's checksums off, has none."""
    return any(record.CRC != 0 for record in _records(path))


def _damaged_record(path: Path) -> str | None:
    """Return the first record of a zip file that does not match its CRC-32, or None.

    `torch.save` writes a CRC-32 of every tensor's bytes, and `torch.load` never compares them. This reads the whole
    file, about 5 GB/s on one core once it is in memory, and keeps none of it.
    """
    if not has_checksums(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _can_be_mapped(path: Path) -> bool:
    """Return whether tensors lie in the file as in memory: in a zip file that is not compressed."""
    records = _records(path)
    return bool(records) and all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _records(path: Path) -> list[zipfile.ZipInfo]:
    """Return what a zip file holds. torch takes a file for one by its start, while other readers look at its end."""
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return []
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


@contextlib.contextmanager
def _allow(classes: Sequence[type]) -> Iterator[None]:
    """Let the unpickler build `classes`, and restore torch's list of them, which the whole process shares."""
    with _ALLOWING:
        present = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([added for added in classes if added not in present]):
            yield
