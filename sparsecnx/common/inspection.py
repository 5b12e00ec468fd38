"""Checks of a file of `torch.save` before torch reads it: what it holds, declares, and would make of it.

torch reads files with `weights_only=True`, which runs no code in them. A file of a few kilobytes can still exhaust
memory or time, or name numbers outside of itself. These checks read the directory and the pickle, never the numbers, in
time and memory that grow with the size of these two alone.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.limits import BYTES_FOR_ONE, REMEDY, check_description, check_expansion, readable
from sparsecnx.common.pickles import PickleInspector

# torch.save began its files with this number before it wrote zip files.
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ZIP = b"PK\x03\x04"


def check_torch_file(path: Path, max_bytes: int) -> dict[str, type]:
    """Check a regular file, which `torch.load` is about to read, and which may take `max_bytes` or its size in memory.

    Returns:
        The classes and functions in it that `torch.save` does not need for tensors and plain values, in the order of
        the file, such as `pathlib.PosixPath`: with `dict` or `list` where items are put into what they make, otherwise
        `object`.

    Raises:
        CheckpointError: the file is too large in memory, or holds what `torch.save` does not write.
        Exception: it is damaged; which kind of error depends on the bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start[: len(ZIP)] == ZIP:
            return _check_zip(file, size, max_bytes)
        if start == LEGACY:
            return _check_legacy(file, size, max_bytes)
        raise ValueError("the file is empty" if size == 0 else "torch.save begins its files in another way")


def _check_zip(file: BinaryIO, size: int, max_bytes: int) -> dict[str, type]:
    check_description("zip directory", _directory_size(file, size), max_bytes)
    with zipfile.ZipFile(file) as archive:
        records: dict[bytes, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            # torch finds a record by its bytes in any case of letters, so that only these tell which one it reads.
            name = record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437").lower()
            if name in records:
                raise ValueError(f"two of its records are called {record.filename}")
            records[name] = record
        check_expansion(sum(record.file_size for record in records.values()), size, max_bytes)
        folder = next(iter(records), b"").partition(b"/")[0]
        if (description := records.get(folder + b"/data.pkl")) is None:
            raise ValueError("it has no record data.pkl")
        check_description("pickle", description.file_size, max_bytes)
        if not any(record.CRC for record in records.values()):
            del description.CRC  # torch's checksums were off, and zipfile would compare the zero
        pickled = io.BytesIO(archive.read(description))
    sizes = {name: record.file_size for name, record in records.items()}
    inspector = PickleInspector(pickled, max_bytes, lambda key: sizes.get(folder + b"/data/" + key.encode().lower(), 0))
    inspector.load()
    check_expansion(max(inspector.tensor_bytes, inspector.storage_bytes), size, max_bytes)
    return inspector.others


def _directory_size(file: BinaryIO, size: int) -> int:
    """Return the bytes of a zip file's directory, which ends where the file ends.

    Other readers than torch's search for the directory. Where it lies here they agree, and so these checks are about
    what torch reads.
    """
    end = size - 22
    file.seek(max(end - 76, 0))
    tail = file.read().rjust(98)
    end64, locator64, end32 = tail[:56], tail[56:76], tail[76:]
    agree = end32[:4] == b"PK\x05\x06" and end32[-2:] == b"\0\0"
    length, start = struct.unpack("<LL", end32[12:20])
    if locator64[:4] == b"PK\x06\x07":
        end -= 76
        agree = agree and end64[:4] == b"PK\x06\x06" and locator64[8:16] == struct.pack("<Q", end)
        length, start = struct.unpack("<QQ", end64[40:])
    if not agree or start + length != end:
        raise ValueError("its zip directory is not at its end")
    return int(length)


def _check_legacy(file: BinaryIO, size: int, max_bytes: int) -> dict[str, type]:
    """Check a file of the time before zip files: five pickles (number, version, system, contents, keys) and numbers."""
    most = max_bytes // BYTES_FOR_ONE
    pickles = io.BytesIO(file.read(most))
    inspector = PickleInspector(pickles, max_bytes, lambda key: size - inspector.storage_bytes)
    try:
        *_, keys = (inspector.load() for _ in range(5))
    except Exception:
        if pickles.tell() < most:
            raise
        raise CheckpointError(
            f"its pickle has {readable(most)} or more, max_bytes / {BYTES_FOR_ONE}; {REMEDY}"
        ) from None
    if type(keys) is not list or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of storages")
    check_expansion(inspector.tensor_bytes, size, max_bytes)
    return inspector.others
