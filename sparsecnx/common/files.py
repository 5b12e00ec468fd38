"""Files that are written whole or not at all, and file names on a terminal.

A file is written under another name in the same folder, forced to disk, and renamed. A full disk or a kill at any
moment leaves what was there as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all.

    Raises:
        OSError: the file system failed; `path` is as before.
    """
    with open_atomically(Path(path)) as (file,):
        file.write(text.encode())


@contextlib.contextmanager
def open_atomically(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Yield files that become `paths` once all of them are on disk, and that are removed after an error.

    The body writes into them, or lets a library put a file of its own under their names.

    Raises:
        OSError: the file system failed; `paths` are as before.
    """
    for path in paths:
        if path.is_dir():  # checked first: the system refuses it only after other files are renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.exists() and not path.is_file():  # the new file would take the place of a device
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
    temporaries = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)  # whatever lies there: a link would lead elsewhere, a FIFO block
            files: list[BinaryIO] = [stack.enter_context(open(temporary, "xb")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                # A library may have renamed its own file over this one, which then gets the mode of this one.
                sync(file.name, mode=stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in paths}:
            sync(folder)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


def sync(path: str | Path, mode: int | None = None) -> None:
    """Force a file to disk, after giving it a mode, or a folder, and with it the renames in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_regular(path: str | Path) -> str | None:
    """Return why `path` is no regular file, which a reader could wait for or read from without end, or None."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a folder; expected a file in it"
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return f"{kinds.get(stat.S_IFMT(mode), 'a device')}; expected a regular file"


def escape(text: str) -> str:
    r"""Write what does not print in `text` as `\x1b` or `\u202e`, so that a name in a file cannot steer a terminal.

    Line breaks are escaped too: `text` is one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """Escape one line of text: what does not print, and what standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return escape(text).encode(encoding, "backslashreplace").decode(encoding)
