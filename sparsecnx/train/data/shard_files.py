"""The files of a sharded data set: their names, their sizes, and the copies of remote ones on this disk.

Remote shards are copied as a whole to a folder of a bounded size, from which the ones that were not used for longest
are removed. All reading processes of a machine share it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import fsspec
from filelock import FileLock, Timeout

from sparsecnx.common.errors import InputError
from sparsecnx.common.files import not_regular

ATTEMPTS = 5  # to copy a remote shard
SECONDS_BETWEEN = 1.0  # the first attempt and the second; each later pause is twice as long
VERSION_TAGS = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "blob_id")  # of http, S3, Google, the Hub
ASKED_AT_ONCE = 16  # remote shards whose sizes are asked for
OWN = re.compile(r"[0-9a-f]{32}\.(tar|held|part)")  # names of copies, see `Copies`


class Shard(NamedTuple):
    """One tar file.

    Attributes:
        url: its path or address.
        size: bytes.
        version: what tells it from one of the same address and size that was there before.
        samples: the number that a list of shards gives; None where none does.
        md5: the MD5 sum that a list of shards gives, in hexadecimal digits; None where none does.
    """

    url: str
    size: int
    version: str
    samples: int | None = None
    md5: str | None = None

    @property
    def local(self) -> bool:
        return is_local(self.url)

    @property
    def name(self) -> str:
        """Return the last part of its address."""
        return urlsplit(self.url).path.rpartition("/")[2] if not self.local else os.path.basename(self.url)

    @property
    def key(self) -> str:
        """Return a file name of its own."""
        return hashlib.blake2b(repr((self.url, self.size, self.version)).encode(), digest_size=16).hexdigest()


def is_local(url: str) -> bool:
    return "://" not in url


def find_shards(pattern: str) -> list[Shard]:
    """Return the shards that a pattern names, in its order.

    Args:
        pattern: paths or addresses with braces, `data/{000..127}.tar`; a local one with `*`, `?` or `[`; several of
            them joined by `::`; or a list of shards in JSON, as `widsindex` writes it.

    Raises:
        InputError: there are none, one is missing or comes twice, or the list is none.
    """
    from webdataset.shardlists import expand_urls

    if urlsplit(pattern).path.endswith(".json"):
        listed = _listed(pattern)
    else:
        try:
            listed = [{"url": match} for url in expand_urls(pattern) for match in _matches(pattern, url)]
        except (ValueError, AssertionError) as error:  # wrong braces, an environment variable that is not there
            raise InputError("data", f"wds:{pattern}", f"cannot be expanded ({error})") from error
    urls = [entry["url"] for entry in listed]
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise InputError("data", f"wds:{pattern}", f"names {twice} more than once; expected each shard once")
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(lambda entry: _shard(pattern, entry), listed))


def _matches(pattern: str, url: str) -> list[str]:
    if url.startswith("pipe:"):
        raise InputError("data", f"wds:{pattern}", "names a command; expected paths or addresses such as https://")
    url = url.removeprefix("file://")
    if not is_local(url) or not glob.has_magic(url):
        return [url]
    found = sorted(glob.glob(url, recursive=True))
    if not found:
        raise InputError("data", f"wds:{pattern}", f"no file fits {url}; expected tar files")
    return found


def _listed(pattern: str) -> list[dict[str, Any]]:
    """Return the entries of a list of shards, their addresses relative to its own or to its `base`."""
    expected = 'expected a list of shards as widsindex writes it, {"shardlist": [{"url": ..., "nsamples": ...}]}'
    try:
        with fsspec.open(pattern, "rb") as file:
            held = json.loads(file.read())
        base = held.get("base") or pattern
        base = base if base == pattern or base.endswith("/") else f"{base}/"
        entries = [{**entry, "url": _joined(base, entry["url"])} for entry in held["shardlist"]]
    except Exception as error:  # file systems raise many kinds of errors
        problem = f"cannot be read ({type(error).__name__}: {error}); {expected}"
        raise InputError("data", f"wds:{pattern}", problem) from error
    if not entries:
        raise InputError("data", f"wds:{pattern}", f"lists no shard; {expected}")
    for entry in entries:
        for field in ("nsamples", "filesize"):
            count = entry.get(field, 1)
            if type(count) is not int or count < 1:
                problem = f"gives {entry['url']} {field} {count!r}; expected a whole number, 1 or more"
                raise InputError("data", f"wds:{pattern}", problem)
    return entries


def _joined(base: str, url: str) -> str:
    if not is_local(url):
        return url.removeprefix("file://")
    return os.path.join(os.path.dirname(base), url) if is_local(base) else urljoin(base, url)


def _shard(pattern: str, entry: dict[str, Any]) -> Shard:
    """Return a shard with its size, of a remote one as the list or its server tells it."""
    url, samples = entry["url"], entry.get("nsamples")
    if is_local(url):
        if (problem := not_regular(url)) is not None:
            raise InputError("data", f"wds:{pattern}", f"{url} is {problem}")
        status = os.stat(url)
        if entry.get("filesize", status.st_size) != status.st_size:
            problem = f"{url} has {status.st_size} bytes, not {entry['filesize']} as the list says"
            raise InputError("data", f"wds:{pattern}", problem)
        return Shard(os.path.abspath(url), status.st_size, str(status.st_mtime_ns), samples)
    if "filesize" in entry:
        md5 = entry.get("md5sum")
        return Shard(url, entry["filesize"], str(md5 or ""), samples, None if md5 is None else str(md5))
    try:
        files, path = fsspec.url_to_fs(url)
        told = files.info(path)
    except Exception as error:  # file systems raise many kinds of errors
        raise InputError(
            "data", f"wds:{pattern}", f"{url} cannot be found ({type(error).__name__}: {error})"
        ) from error
    if not told.get("size"):
        remedy = "a list of shards in JSON with filesize, as widsindex writes it, does"
        raise InputError("data", f"wds:{pattern}", f"the server does not tell the size of {url}; {remedy}")
    version = next((str(told[tag]) for tag in VERSION_TAGS if told.get(tag)), "")
    return Shard(url, int(told["size"]), version, samples)


class Copies:
    """Copies of remote shards in a folder of our own that holds at most `most` bytes of them.

    Of a shard that is copied, KEY.part is what there is of it, and KEY.held is an empty file of its size, which keeps
    its room. KEY.tar is the copy. Other files in the folder are never removed.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard, a remote one after it is copied here. An open one stays whole when its copy is removed.

        Raises:
            OSError: it cannot be copied, after several attempts, or has another size or sum than it should.
        """
        if shard.local:
            return open(shard.url, "rb")
        with contextlib.suppress(FileNotFoundError):
            return self._opened(shard)
        with self.lock(shard.key):
            return self._opened_or_copied(shard)

    @contextlib.contextmanager
    def kept(self, shard: Shard) -> Iterator[BinaryIO]:
        """Open a shard as `open` does; its copy is not removed before the end of the context."""
        if shard.local:
            with open(shard.url, "rb") as file:
                yield file
            return
        with self.lock(shard.key), self._opened_or_copied(shard) as file:
            yield file

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.key}.tar"

    def _opened(self, shard: Shard) -> BinaryIO:
        """Open a copy, which then is the last that is removed."""
        file = open(self._path(shard), "rb")  # noqa: SIM115  # the caller closes it
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(shard))
        return file

    def _opened_or_copied(self, shard: Shard) -> BinaryIO:
        """Open a copy, or make it. The lock of the shard is held, so that no two processes copy it."""
        with contextlib.suppress(FileNotFoundError):
            return self._opened(shard)
        path = self._path(shard)
        part, held = path.with_suffix(".part"), path.with_suffix(".held")
        self._make_room(shard.size, held)
        try:
            _attempt(lambda: _download(shard, part))
            with self.lock("all"):
                os.replace(part, path)
                held.unlink()
            return self._opened(shard)
        finally:
            with self.lock("all"):
                part.unlink(missing_ok=True)
                held.unlink(missing_ok=True)

    def _make_room(self, size: int, own: Path) -> None:
        """Remove copies until one of `size` fits, and keep its room by the file `own` of this size."""
        if size > self.most:
            raise OSError(f"{size} bytes are more than the {self.most} of the folder of copies, {self.folder}")
        while True:
            with self.lock("all"):
                files = [(file, os.stat(file)) for file in self._files() if file.stem != own.stem]
                total = sum(status.st_size for file, status in files if file.suffix != ".part")
                # What processes were copying when they were killed comes first.
                for file, status in sorted(files, key=lambda one: (one[0].suffix == ".tar", one[1].st_mtime_ns)):
                    if file.suffix == ".tar" and total + size <= self.most:
                        break
                    if self._removed(file) and file.suffix != ".part":
                        total -= status.st_size
                if total + size <= self.most:
                    with open(own, "wb") as reserved:
                        reserved.truncate(size)
                    return
            time.sleep(0.05)  # others are copying; what they have copied can be removed

    def _files(self) -> list[Path]:
        return [Path(entry.path) for entry in os.scandir(self.folder) if OWN.fullmatch(entry.name)]

    def _removed(self, file: Path) -> bool:
        """Remove a file, and return whether it is gone. Who copies or keeps a shard holds its lock."""
        try:
            with self.lock(file.stem, timeout=0):
                file.unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        """Return a lock that one process, or one thread of it, has at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{name}.lock", timeout=timeout)


def _download(shard: Shard, part: Path) -> None:
    files, path = fsspec.url_to_fs(shard.url)
    files.get_file(path, str(part))
    if (copied := part.stat().st_size) != shard.size:
        raise OSError(f"{shard.url} has {copied} bytes, not {shard.size} as before")
    if shard.md5 is not None and (found := _md5(part)) != shard.md5.lower():
        raise OSError(f"{shard.url} has the MD5 sum {found}, not {shard.md5} as the list says")


def _md5(path: Path) -> str:
    found = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _attempt(act: Callable[[], None]) -> None:
    """Act, again after a pause where it fails.

    Raises:
        OSError: the last attempt failed, too.
    """
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except Exception as error:  # file systems raise many kinds of errors
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{type(error).__name__}: {error}, in {ATTEMPTS} attempts") from error
            time.sleep(SECONDS_BETWEEN * 2**attempt)
