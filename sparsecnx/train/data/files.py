"""The files of a data set: which there are below a folder, and what tells one set of them from another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecnx.common.errors import InputError
from sparsecnx.common.files import not_regular
from sparsecnx.train.data.source import Fingerprint, Source, spread

ENDINGS = {
    "images": (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    "volumes": (".npy", ".nii", ".nii.gz"),
}
# Images of other formats, which are not read. A folder that holds some beside others is no surprise, but is said.
OTHER_IMAGES = (".avif", ".exr", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".svs", ".tga")
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class FileSet(Source):
    """Files of one kind, in a fixed order.

    Attributes:
        root: folder that `names` are relative to.
        names: paths below `root`, with forward slashes.
    """

    root: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    @property
    def place(self) -> str | None:
        return os.path.abspath(self.root)

    def labels(self) -> list[str]:
        """Return of every entry the folder below `root` that it lies in."""
        found = []
        for index in range(len(self)):
            name, below, _ = self.name(index).partition("/")
            if not below:
                expected = "expected a folder of files for each class"
                raise InputError("data", self.root, f"holds {name}, which is in no folder of a class; {expected}")
            found.append(name)
        return found

    def fingerprint(self) -> Fingerprint:
        """Return hashes of names, sizes and a sample of the contents. A million files take about 6 seconds."""
        paths = [os.path.join(self.root, name) for name in self.names]
        sizes, contents = map(_sizes, paths), (some_bytes(paths[number]) for number in spread(len(paths)))
        return Fingerprint(
            hashed([os.fsencode("\n".join(self.names))]), hashed([",".join(sizes).encode()]), hashed(contents)
        )


def find_files(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names of all images, all volumes and all `OTHER_IMAGES` below `folder`, sorted by path.

    Links are followed. A folder that can be reached in several ways, such as by a link to its parent, is listed once. A
    Zarr array and an OME-Zarr image are folders that count as one volume.

    Raises:
        InputError: `folder` does not exist, is not a folder, or a folder in it cannot be listed.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        missing = "no such folder; expected images or volumes in one"
        raise InputError("data", folder, "not a folder" if os.path.exists(root) else missing)
    kinds = ENDINGS | {"others": OTHER_IMAGES}
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    try:
        for parent, files in _walk(root):
            if is_zarr(parent, files):
                found["volumes"].append(Path(parent).relative_to(root).as_posix())
                continue
            for file in files:
                for kind, endings in kinds.items():
                    if file.lower().endswith(endings):
                        found[kind].append(Path(parent, file).relative_to(root).as_posix())
    except OSError as error:
        raise InputError("data", folder, f"cannot be listed ({error})") from error
    return {kind: tuple(sorted(names)) for kind, names in found.items()}


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it with its files. Links are followed, and no folder comes twice."""
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if is_zarr(parent, files):
            folders.clear()
        # Folders come before links to them, so that the names do not depend on the order on disk.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        yield parent, files


def _raise(error: OSError) -> None:
    raise error


def is_zarr(folder: str, files: Iterable[str]) -> bool:
    """Return whether a folder with these files is a Zarr array or an OME-Zarr image, of format 2 or 3."""
    if ".zarray" in files:
        return True
    if "zarr.json" in files:
        metadata = read_json(os.path.join(folder, "zarr.json"))
        return metadata.get("node_type") != "group" or multiscales(metadata.get("attributes")) is not None
    return ".zattrs" in files and multiscales(read_json(os.path.join(folder, ".zattrs"))) is not None


def multiscales(attributes: Any) -> str | None:
    """Return the path of the largest array of an OME-Zarr image, by the attributes of its group; None for others."""
    try:
        path = attributes.get("ome", attributes)["multiscales"][0]["datasets"][0]["path"]
    except (AttributeError, LookupError, TypeError):
        return None
    return path if isinstance(path, str) else None


def read_json(path: str) -> dict[str, Any]:
    """Return the dict in a file, empty where there is none."""
    if not_regular(path) is not None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def hashed(parts: Iterable[bytes]) -> str:
    """Return a hash of parts, one after the other, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sizes(path: str) -> str:
    """Return the size of a file in bytes, or -1 if there is none; of a folder the names and sizes of its files."""
    if os.path.isdir(path):
        return hashed(f"{name}\n{_sizes(os.path.join(path, name))}\n".encode() for name in _names_in(path))
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return "-1"


def some_bytes(path: str) -> bytes:
    """Return the first, middle and last bytes of a file, or nothing if it cannot be read."""
    if os.path.isdir(path):
        names = _names_in(path)
        taken = (names[i * (len(names) - 1) // 2] for i in range(3) if names)
        return b"".join(some_bytes(os.path.join(path, name)) for name in taken)
    if not_regular(path) is not None:
        return b""
    try:
        with open(path, "rb") as file:
            size, parts = os.fstat(file.fileno()).st_size, []
            for place in (0, (size - SAMPLED_BYTES) // 2, size - SAMPLED_BYTES):
                file.seek(max(place, 0))
                parts.append(file.read(SAMPLED_BYTES))
            return b"".join(parts)
    except OSError:
        return b""


def _names_in(folder: str) -> list[str]:
    """Return all files below a folder that is a Zarr array, sorted."""
    return sorted(os.path.relpath(os.path.join(p, name), folder) for p, _, names in os.walk(folder) for name in names)
