"""Limits of the memory and time that reading a file may take, whatever the file says."""

from __future__ import annotations

from pathlib import Path

from sparsecnx.common.errors import CheckpointError

MOST_BYTES = 2**30
# Python needs up to this many bytes of memory for one byte of a pickle, a zip directory, or a header of safetensors,
# and for 4 MiB of them a few seconds. The largest published network has 0.1 MiB.
BYTES_FOR_ONE = 256
REMEDY = "raise max_bytes (--max-bytes of convert) if you trust the file"


def check_description(what: str, size: int, max_bytes: int) -> None:
    """Raise CheckpointError if a part of a file that Python takes apart is too long for `max_bytes` of memory."""
    if size > max_bytes // BYTES_FOR_ONE:
        most = f"expected at most {readable(max_bytes // BYTES_FOR_ONE)}, max_bytes / {BYTES_FOR_ONE}"
        raise CheckpointError(f"its {what} has {readable(size)}: {most}; {REMEDY}")


def check_expansion(expanded: int, size: int, max_bytes: int) -> None:
    """Raise CheckpointError if what a file of `size` bytes holds takes more memory than itself and than `max_bytes`."""
    if expanded > max(size, max_bytes):
        expands = f"expands from {readable(size)} to {readable(expanded)}"
        raise CheckpointError(f"{expands}: expected at most {readable(max_bytes)}; {REMEDY}")


def check_holes(path: Path, max_bytes: int) -> None:
    """Raise CheckpointError if a file is many times larger than what the disk holds of it, and than `max_bytes`.

    Numbers compress little, on file systems that do so. Those that do not know what they hold say 0.
    """
    status = path.stat()
    on_disk = getattr(status, "st_blocks", 0) * 512
    if on_disk and status.st_size > 16 * on_disk:
        check_expansion(status.st_size, on_disk, max_bytes)


def readable(size: int) -> str:
    """Format a number of bytes, such as `6.7 GB`."""
    power = min((len(str(size)) - 1) // 3, 6)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"
