"""The order in which an epoch shows the entries of a source: a function of the seed and the epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed from several numbers or words; similar inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def around(first: int, count: int, seed: int) -> Iterator[int]:
    """Yield the numbers 0 to `count` - 1 from `first` on, each once, in steps of a length that the seed chooses."""
    step = 1 + seed % count
    while math.gcd(step, count) != 1:
        step += 1
    return ((first + step * number) % count for number in range(count))


def shuffled(entries: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """Return the numbers 0 to `entries` - 1, each `repeats` times, int64 `(N,)`."""
    generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
    return torch.randperm(entries * repeats, generator=generator) % entries


def shuffled_by_shard(
    counts: Sequence[int], repeats: int, seed: int, epoch: int, *, window: int, batch: int, ranks: int
) -> Tensor:
    """Return the entries of shards in an order that reads few shards at a time, int64 `(N,)`.

    The shards are shuffled, and their entries, one shard after the other, are divided into equal parts, one for each
    rank. In its part an entry moves back by the length of up to `window` shards, at random. So a rank reads each of its
    shards for a while and not again, at most `window` + 1 at a time.

    Args:
        counts: entries of each shard; those of the second follow those of the first.
        repeats: times that each entry is shown.
        seed: of the run.
        epoch: number of the epoch.
        window: shards that are mixed.
        batch: entries of a forward pass over all ranks, a multiple of `ranks`.
        ranks: processes, of which rank r reads the r-th part of each batch. What fills no batch is left out.
    """
    generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
    lengths = torch.tensor(counts)
    starts = lengths.cumsum(0) - lengths
    shards = torch.cat([torch.randperm(len(counts), generator=generator) for _ in range(repeats)])
    places = torch.arange(len(shards)).repeat_interleave(lengths[shards])
    before = lengths[shards].cumsum(0) - lengths[shards]
    entries = torch.arange(len(places)) + (starts[shards] - before)[places]

    moved = places + window * torch.rand(len(places), dtype=torch.float64, generator=generator)
    share, each = len(entries) // ranks, batch // ranks
    steps = share // each
    parts = []
    for first in range(0, share * ranks, share):
        order = moved[first : first + share].argsort(stable=True)[: steps * each]
        parts.append(entries[first : first + share][order].view(steps, each))
    return torch.stack(parts, 1).flatten()
