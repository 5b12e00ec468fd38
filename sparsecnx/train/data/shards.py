"""Images in WebDataset shards: tar files on this disk or elsewhere, more of them than the disk holds."""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.files import ENDINGS, hashed, some_bytes
from sparsecnx.train.data.formats import Header
from sparsecnx.train.data.images import ImageFiles
from sparsecnx.train.data.memory import memory_header, memory_pixels
from sparsecnx.train.data.order import around, mix, shuffled_by_shard
from sparsecnx.train.data.pictures import UnsupportedImage
from sparsecnx.train.data.shard_files import ASKED_AT_ONCE, Copies, Shard
from sparsecnx.train.data.shard_index import BadShard, Place, Sample, index_tar, load_index, save_index
from sparsecnx.train.data.source import Fingerprint
from sparsecnx.train.recipe import Recipe

WINDOW = 8  # shards that are mixed
COPIED_GB = 64.0  # copies of remote shards
INDEXES = 64  # of shards, which a reading process keeps


def default_cache() -> Path:
    """Return the folder of indexes and copies of shards: `$XDG_CACHE_HOME/sparsecnx/shards`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparsecnx", "shards")


class ShardSource(ImageFiles):
    """The samples of shards, in the order of the shards.

    Samples are counted once; the index of each shard is then kept in the cache. Where a list of shards tells the
    numbers, a remote shard is indexed when it is first read.

    Args:
        place: the address of the data, for messages and checkpoints.
        shards: see `shard_files.find_shards`.
        image: ending of the file that is the image, such as `left.jpg`; None for the only image of a sample.
        window: shards that are mixed, see `order.shuffled_by_shard`.
        cache: folder of the indexes, and of copies of remote shards, for this alone; None for `default_cache`.
        cache_gb: most 10^9 bytes of these copies.

    Raises:
        InputError: a shard cannot be read, is empty or holds another number of samples than the list says, or the
            copies of the shards of a window do not fit.
    """

    ordered_by_rank = True

    def __init__(
        self,
        place: str,
        shards: Sequence[Shard],
        *,
        image: str | None = None,
        window: int = WINDOW,
        cache: Path | None = None,
        cache_gb: float = COPIED_GB,
    ) -> None:
        self.root, self.shards, self.image, self.window = place, tuple(shards), image, window
        self.copies = Copies(cache or default_cache(), int(cache_gb * 1e9))
        self._expect_room()
        self.indexes: OrderedDict[int, list[Sample]] = OrderedDict()
        self.broken: dict[int, BadShard] = {}
        self._announce()
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            self.counts = list(pool.map(self._count, range(len(self.shards))))
        self.ends = list(itertools.accumulate(self.counts))
        self.ahead = 0 if all(shard.local for shard in self.shards) else max(self.counts)
        self.expected: OrderedDict[int, None] = OrderedDict()  # shards, the last one last

    def _expect_room(self) -> None:
        """Expect that the shards of a window, and those that reading processes copy ahead, fit into the cache."""
        remote = sorted((shard.size for shard in self.shards if not shard.local), reverse=True)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun; all processes of a machine share the cache
        needed = sum(remote[: ranks * (self.window + 2)])
        if needed > self.copies.most:
            least = (
                f"at least {needed / 1e9:.3g}, {ranks * (self.window + 2)} shards: the window of {self.window} and 2"
            )
            remedy = "a smaller window needs less"
            raise InputError("data", self.root, f"cache_gb is {self.copies.most / 1e9:g}; expected {least}; {remedy}")

    def _announce(self) -> None:
        """Say how much is copied before the run begins, where no list and no index tells the numbers of samples."""
        unknown = [
            shard
            for shard in self.shards
            if not shard.local and shard.samples is None and not self._index_file(shard).exists()
        ]
        if unknown and os.environ.get("RANK", "0") == "0":
            size = f"{sum(shard.size for shard in unknown) / 1e9:.3g} GB"
            remedy = "a list of shards in JSON with nsamples and filesize saves this"
            print(f"counting the samples of {len(unknown)} remote shards, {size}, once; {remedy}", flush=True)

    def _index_file(self, shard: Shard) -> Path:
        return self.copies.folder / f"{shard.key}.json"

    def _count(self, shard: int) -> int:
        """Return the samples of a shard, of a remote one as the list tells it, but for the first one."""
        told = self.shards[shard].samples
        if told is not None and not self.shards[shard].local and shard > 0:
            return told
        try:
            return len(self._read_index(shard))
        except (OSError, BadShard) as error:
            raise InputError("data", self.root, f"{self.shards[shard].url} {_said(error)}") from error

    def _read_index(self, number: int) -> list[Sample]:
        """Return the samples of a shard, which is read where no earlier run kept them."""
        shard = self.shards[number]
        path = self._index_file(shard)
        with self.copies.lock(f"{shard.key}-index"):  # other processes may index the same shard
            samples = load_index(path)
            if samples is None:
                with self.copies.kept(shard) as file:
                    samples = index_tar(file)
                save_index(path, samples)
        if shard.samples not in (None, len(samples)):
            raise BadShard(f"holds {len(samples)} samples, not {shard.samples} as the list says")
        return samples

    def _index(self, number: int) -> list[Sample]:
        """Return the samples of a shard, and keep those of the last shards.

        Raises:
            BadShard: it is damaged, which is not tried again.
            InputError: it cannot be reached.
        """
        if number in self.broken:
            raise self.broken[number]
        if number not in self.indexes:
            try:
                with self._reached(number):
                    self.indexes[number] = self._read_index(number)
            except BadShard as error:
                self.broken[number] = error
                raise
            while len(self.indexes) > INDEXES:
                self.indexes.popitem(last=False)
        self.indexes.move_to_end(number)
        return self.indexes[number]

    @contextlib.contextmanager
    def _reached(self, number: int) -> Iterator[None]:
        """Stop the run where a shard cannot be reached: to go on without it would depend on when who reads it."""
        try:
            yield
        except OSError as error:
            raise InputError("data", self.root, f"{self.shards[number].url} {_said(error)}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    def _find(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample, and its number there."""
        shard = bisect.bisect_right(self.ends, index)
        return shard, index - self.ends[shard] + self.counts[shard]

    def name(self, index: int) -> str:
        """Return the shard and the key of a sample, or its number before the shard is read; of a bad shard its name."""
        shard, number = self._find(index)
        if shard in self.broken:
            return self.shards[shard].url
        key = self.indexes[shard][number].key if shard in self.indexes else number
        return f"{self.shards[shard].name}/{key}"

    def instead(self, index: int, seed: int) -> Iterator[int]:
        """Yield a sample, then the others of its shard, then those of the next shards, so that few are copied."""
        yield index
        first, number = self._find(index)
        for shard in [*range(first, len(self.shards)), *range(first)]:
            count = self.counts[shard]
            for place in around(number % count, count, mix(seed, "instead", index)):
                if shard in self.broken:
                    break
                if (other := self.ends[shard] - count + place) != index:
                    yield other

    def header(self, index: int) -> Header:
        array = self._array(index)
        return super().header(index) if array is None else memory_header(array, self.in_chans)

    def read(self, index: int, recipe: Recipe) -> Tensor:
        array = self._array(index)
        return super().read(index, recipe) if array is None else memory_pixels(array, recipe, self.types(recipe))

    def _array(self, index: int) -> np.ndarray[Any, Any] | None:
        """Return the array of a sample; None where its image is a file of another kind."""
        if not self._place(index)[1].endswith("npy"):
            return None
        array: np.ndarray[Any, Any] = np.load(io.BytesIO(self.file(index)), allow_pickle=False)
        return array

    def _place(self, index: int) -> tuple[int, str, Place]:
        """Return the shard of a sample, the ending of its image, and where that lies."""
        shard, number = self._find(index)
        sample = self._index(shard)[number]
        ending = image_of(sample, self.image)
        return shard, ending, sample.parts[ending]

    def file(self, index: int) -> bytes:
        shard, _, (offset, size) = self._place(index)
        with self._reached(shard), self.copies.open(self.shards[shard]) as file:
            file.seek(offset)
            return file.read(size)

    def expect(self, entries: Sequence[int]) -> None:
        """Copy the remote shards of these samples, while those before them are read. A reader meets what fails."""
        for shard in sorted({self._find(index)[0] for index in entries}):
            if shard not in self.expected and not self.shards[shard].local:
                threading.Thread(target=self._copy_ahead, args=(shard,), daemon=True).start()
            self.expected[shard] = None
            self.expected.move_to_end(shard)
            if len(self.expected) > 2 * (self.window + 2):  # more than are read at a time
                self.expected.popitem(last=False)

    def _copy_ahead(self, shard: int) -> None:
        with contextlib.suppress(OSError):
            self.copies.open(self.shards[shard]).close()

    def fingerprint(self) -> Fingerprint:
        """Return hashes of the shards' names and counts, of their sizes, and of parts of local ones.

        Of remote ones it takes what their server says: the ETag, or the date of the last change.
        """
        names = "\n".join(f"{shard.name} {count}" for shard, count in zip(self.shards, self.counts, strict=True))
        sampled = np.linspace(0, len(self.shards) - 1, min(len(self.shards), 256), dtype=int).tolist()
        contents = (some_bytes(s.url) if s.local else s.version.encode() for s in (self.shards[i] for i in sampled))
        sizes = ",".join(str(shard.size) for shard in self.shards)
        return Fingerprint(hashed([os.fsencode(names)]), hashed([sizes.encode()]), hashed(contents))

    def sample(self) -> list[int]:
        """Return entries spread evenly over all shards, or over the first one where some are remote."""
        count = len(self) if all(shard.local for shard in self.shards) else self.counts[0]
        most = min(count, 256)
        return [i * count // most for i in range(most)]

    def order(self, seed: int, epoch: int, repeats: int, batch: int, ranks: int) -> Tensor:
        return shuffled_by_shard(self.counts, repeats, seed, epoch, window=self.window, batch=batch, ranks=ranks)


def image_of(sample: Sample, wanted: str | None) -> str:
    """Return the ending of the image of a sample: the wanted one, or the only one.

    Raises:
        UnsupportedImage: there is none, or several.
    """
    endings = (*ENDINGS["images"], ".npy")
    found = [ending for ending in sample.parts if f".{ending}".endswith(endings) and wanted in (None, ending)]
    if len(found) == 1:
        return found[0]
    held = ", ".join(sample.parts) or "nothing"
    what = "has several images" if found else f"has no image {wanted or ''}".rstrip()
    raise UnsupportedImage(f"{what} in {held}; expected one, and image=ENDING in the address chooses")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, BadShard) else f"cannot be read ({type(error).__name__}: {error})"
