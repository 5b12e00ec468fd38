"""The index of a WebDataset shard: its samples, and where in the tar file their parts lie.

The package `webdataset` says which files of a tar form a sample. It reads a shard from its beginning alone; with the
places of the parts a sample is read by its number, so that a run goes on at any step without what lies before it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sparsecnx.common.files import write_atomically

VERSION = 2  # of the file that holds an index
END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar, at least
METADATA = re.compile(r"__[^/]*__($|/)")  # files that webdataset leaves out


class BadShard(ValueError):
    """A shard cannot be read as a whole; the message says why."""


class Place(NamedTuple):
    """The bytes of one file in a tar."""

    offset: int
    size: int


class Sample(NamedTuple):
    """One sample.

    Attributes:
        key: its name, unique in a shard.
        parts: the bytes of each of its files, by the file's ending, such as `jpg` or `left.png`.
    """

    key: str
    parts: dict[str, Place]


def index_tar(file: BinaryIO) -> list[Sample]:
    """Return the samples of an open tar file in their order. It reads the headers and skips the contents.

    Raises:
        BadShard: it is no tar, compressed, damaged, cut off, or holds no sample.
    """
    from webdataset.tariterators import group_by_keys

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            samples = list(group_by_keys(_files(tar)))
            _expect_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise BadShard(f"is no whole tar file ({error}); expected an uncompressed one") from error
    except ValueError as error:  # of webdataset, with a whole list of things behind the message
        raise BadShard(str(error.args[0])) from error
    if not samples:
        raise BadShard("holds no sample; expected files such as 000.jpg and 000.json")
    return [Sample(sample["__key__"], _parts(sample)) for sample in samples]


def _files(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar as webdataset does, with their places in the place of their contents."""
    for member in tar:
        if member.isreg() and not METADATA.match(member.name):
            if member.issparse():
                raise BadShard(f"holds {member.name}, a sparse file; expected plain ones")
            yield {"fname": member.name, "data": Place(member.offset_data, member.size), "__url__": ""}


def _expect_end(file: BinaryIO, offset: int) -> None:
    """Expect the end of a tar where its last file ends. Python takes a damaged header for the end, too.

    Raises:
        BadShard: there is something else.
    """
    file.seek(offset)
    block = file.read(len(END))
    problem = None if len(block) == len(END) else "is cut off"
    while block and problem is None:
        problem = f"is damaged behind byte {offset}" if block.strip(b"\0") else None
        block = file.read(2**20)
    if problem is not None:
        raise BadShard(
            f"is no whole tar file ({problem}); expected blocks of zeros at its end, and nothing behind them"
        )


def _parts(sample: dict[str, Any]) -> dict[str, Place]:
    return {ending: place for ending, place in sample.items() if isinstance(place, Place)}


def save_index(path: Path, samples: list[Sample]) -> None:
    """Write an index, whole or not at all."""
    write_atomically(path, json.dumps({"version": VERSION, "samples": samples}))


def load_index(path: Path) -> list[Sample] | None:
    """Return the index in a file; None where there is none, or one that this version did not write."""
    try:
        held = json.loads(path.read_bytes())
        if held["version"] != VERSION:
            return None
        return [Sample(key, {end: Place(*place) for end, place in parts.items()}) for key, parts in held["samples"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
