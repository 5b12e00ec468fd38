"""One run at a time writes to a folder.

    runs/demo/run.lock     locked while a run writes to the folder; says which process that is

The operating system holds the lock and drops it when the process ends in any way, `kill -9` included.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from sparsecnx.common.errors import InputError

LOCK = "run.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Make `folder` if it is missing, and keep other runs out of it.

    Yields None, or the reason why the file system cannot lock. Afterwards a folder that was made here and is still
    empty is removed, so that a refused run leaves nothing behind.

    Raises:
        InputError: another run has the folder, or it cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, problem = _lock(path)
    except OSError as error:
        _remove_empty(missing)
        raise InputError("output", folder, f"cannot be written ({error})") from error
    try:
        yield problem
    finally:
        with contextlib.suppress(OSError):  # the folder is gone
            if is_open_file(path, descriptor):  # or else somebody put another folder in its place
                path.unlink()
                _remove_empty(missing)
        os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty, or it was not made
            folder.rmdir()


def is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether `path` still names the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(path: Path) -> tuple[int, str | None]:
    """Return the open lock file, and None or the reason why the file system cannot lock it."""
    while True:
        descriptor, problem = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), None
        try:
            # A lock of this kind belongs to the process. One of flock would live on in the forked reading processes.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            remedy = "wait until it ends, or name another folder"
            raise InputError("output", path.parent, f"in use by {holder}; {remedy}") from error
        except OSError as error:
            problem = str(error)
        if is_open_file(path, descriptor):  # or else its owner removed it before it was locked here
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
    return descriptor, problem
