"""Files of `torch.save`: written whole or not at all, and read without running code in them."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.common.inspection import LEGACY, ZIP, check_torch_file
from sparsecnx.common.limits import MOST_BYTES, check_holes
from sparsecnx.common.pickles import OF_TORCH

_ALLOWING = threading.Lock()


class Omitted:
    """Stands where a file holds an object of another class, whose name its own class has. Nothing of it is read."""

    def __new__(cls, *arguments: Any) -> Omitted:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


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


def load_torch(path: str | Path, omit_objects: bool = False, mmap: bool = False, max_bytes: int = MOST_BYTES) -> Any:
    """Read any file of `torch.save` onto the CPU, without running code in it.

    Args:
        path: the file.
        omit_objects: True if the file may hold objects of other classes beside tensors and plain values. Their classes
            are not imported: an `Omitted` stands for each, or a dict or list with the items of one that is a dict or
            list.
        mmap: map the tensors into memory and read them when they are used, where the kind of file allows it. The file
            may be renamed, replaced or deleted meanwhile, but not written into.
        max_bytes: the most that a file may take in memory if that is more than it has: one that is compressed, has
            holes, or holds tensors that share their numbers.

    Raises:
        CheckpointError: there is no such file, it is truncated or damaged, it is larger than `max_bytes` in memory, or
            it holds objects of other classes.
    """
    path = Path(path)
    if (problem := not_regular(path)) is not None:
        raise CheckpointError(problem)
    try:
        with _ALLOWING:  # what the process lets in is the same for the checks and for torch
            check_holes(path, max_bytes)
            others = check_torch_file(path, max_bytes)
            if (damaged := _damaged_record(path)) is not None:
                raise CheckpointError(f"truncated or damaged: the checksum of its record {damaged} does not match")
            if refused := _known_to_torch(path, others) if omit_objects else list(others):
                more = f"it holds more than tensors and plain values, first {refused[0]:.200}"
                raise CheckpointError(f"not a checkpoint: {more}")
            # torch restores its list of what it lets in, which the whole process shares.
            with torch.serialization.safe_globals([(_stand_in(*other), other[0]) for other in others.items()]):
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


def _known_to_torch(path: Path, names: Mapping[str, type]) -> list[str]:
    """Return those of the names in a file for which torch would not take a stand-in."""
    own = [name for name in names if name.partition(".")[0] in OF_TORCH]
    if not own or not _records(path):  # torch lists the names of zip files only
        return own
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [name for name in own if name not in unknown]


def _stand_in(name: str, holds: type) -> Callable[..., Any]:
    """Return a class that takes any arguments and makes an `Omitted`, or a dict or list of those that torch fills."""
    if holds is object:
        return type(name, (Omitted,), {})
    made = OrderedDict if holds is dict else list  # torch sets attributes of an OrderedDict, and not of a dict
    return type(name, (), {"__new__": lambda cls, *arguments: made()})
