"""Find the network in a state dict: what stands before its names, and which entries lie beside it.

Wrappers and modules around a network put their names before its own: `module.` of DistributedDataParallel, `_orig_mod.`
of torch.compile, `model.` or `backbone.` of training code. Copies in buffers have `_` for dots.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints import formats
from sparsecnx.compat.checkpoints.formats import Format

MOST_PREFIXES = 8  # of a format that are looked at, those with the most names
SHOWN = 5
CHOICE = "choose one with prefix (--prefix of convert)"


class Network(NamedTuple):
    """A network among the entries of a state dict.

    Attributes:
        prefix: what stands before its names.
        entries: its names without the prefix, with a dot wherever its format has one, and those in the state dict.
        foreign: True if it is a network by its own names, of a run of ours.
    """

    prefix: str
    entries: dict[str, str]
    foreign: bool


class _Candidate(NamedTuple):
    """A place where a network may be: the names of its encoder, and how many more entries fit there than do not."""

    prefix: str
    format: Format | None
    encoder: frozenset[str]
    fitting: float
    has_stem: bool


def find_network(names: Sequence[str], prefix: str | None = None, choice: str = CHOICE) -> Network | None:
    """Return the network whose names are among `names`, or None if there is none that we know.

    It is a ConvNeXt in any format, or the encoder of `SparK`, of `MPMAE`, or of `FCMAE` around another network.
    Entries belong to it if their names begin as those of its format do.

    Args:
        names: of a state dict.
        prefix: what stands before the names, or the first part of it; None finds it.
        choice: what the reader can do where there are two networks.

    Raises:
        CheckpointError: there are two networks, no name begins with `prefix`, or two names are of the same entry.
    """
    start = "" if prefix is None else with_end(prefix)
    if prefix and not any(name.startswith(start) for name in names):
        raise CheckpointError(f"no name begins with {start!r}" + prefixes_of(names))
    candidates = [
        place for place in (*_autoencoders(names), *_of_formats(names, start)) if place.prefix.startswith(start)
    ]
    if prefix is not None and any(place.prefix == start for place in candidates):
        candidates = [place for place in candidates if place.prefix == start]
    found: list[_Candidate] = []
    for place in sorted(candidates, key=lambda place: (-place.fitting, len(place.prefix))):
        if not any(place.encoder & better.encoder for better in found):  # else another reading of the same network
            found.append(place)
    found = [place for place in found if place.has_stem] or found[:1]
    if found[1:]:
        places = [f"{place.prefix!r} ({len(place.encoder)} entries)" for place in found]
        raise CheckpointError(f"holds {len(found)} networks, after the prefixes {_some(places)}: {choice}")
    return _network(names, found[0]) if found else None


def with_end(prefix: str) -> str:
    """Return a prefix with the dot that ends it, unless it ends in a dot or `_`."""
    return prefix if prefix.endswith((".", "_")) or not prefix else f"{prefix}."


def prefixes_of(names: Collection[str]) -> str:
    """Return a clause with the prefixes of most names and how many have them; an empty one if there are none."""
    parts = _counted(names, "")
    for _ in range(MOST_PREFIXES):
        if len(parts) == 1:  # one prefix of all names says little
            parts = _counted(names, *parts) or parts
    places = [f"{prefix!r} ({count})" for prefix, count in parts.most_common()]
    return f"; its prefixes are {_some(places)}" if places else ""


def _counted(names: Collection[str], start: str) -> Counter[str]:
    """Return how many names have each prefix that is one part longer than `start`."""
    rests = [name[len(start) :] for name in names if name.startswith(start)]
    return Counter(f"{start}{rest.partition('.')[0]}." for rest in rests if "." in rest)


def _some(places: list[str]) -> str:
    return ", ".join(places[:SHOWN]) + (f" and {len(places) - SHOWN} more" if places[SHOWN:] else "")


def _autoencoders(names: Sequence[str]) -> Iterator[_Candidate]:
    """Yield the encoders of `SparK` and `MPMAE`, and of `FCMAE` around another network than ConvNeXt."""
    ends = ("mask_tokens.0", "mask_token")
    masked = {name[: -len(end)]: end for end in reversed(ends) for name in names if f".{name}".endswith(f".{end}")}
    for outer in list(masked)[:MOST_PREFIXES]:
        prefix = f"{outer}encoder."
        encoder = frozenset(name for name in names if name.startswith(prefix))
        foreign = not any(name.startswith(f"{prefix}downsample_layers.") for name in encoder)
        several = any(name.startswith(f"{outer}decoders.") for name in names)  # of MPMAE
        if encoder and (foreign or several or masked[outer] == "mask_tokens.0"):
            yield _Candidate(prefix, None if foreign else formats.CONVNEXTV2, encoder, math.inf, True)


def _of_formats(names: Sequence[str], start: str) -> Iterator[_Candidate]:
    """Yield the places where names of an encoder lie, for each format those with the most of them."""
    for format in formats.ALL:
        encoders = defaultdict(set)
        for name in names:
            prefix = format.prefix_of(name)
            if prefix is not None and prefix.startswith(start):
                encoders[prefix].add(name)
        for prefix in sorted(encoders, key=lambda prefix: -len(encoders[prefix]))[:MOST_PREFIXES]:
            within = [name[len(prefix) :] for name in names if name.startswith(prefix)]
            spelled = [format.spelled(name) for name in within]
            strange = sum(known is None and format.has_part(name) for name, known in zip(within, spelled, strict=True))
            fitting = sum(known is not None for known in spelled) - strange
            stem = format.place("downsample_layers.0.0.weight")[0]
            yield _Candidate(prefix, format, frozenset(encoders[prefix]), fitting, stem in spelled)


def _network(names: Sequence[str], place: _Candidate) -> Network:
    """Return the network at a place. Entries that only look like its own stay in it, for the caller to refuse."""
    entries: dict[str, str] = {}
    for name in names:
        own = name[len(place.prefix) :]
        if not name.startswith(place.prefix):
            continue
        if place.format is not None:
            spelled = place.format.spelled(own)
            if spelled is None and not place.format.has_part(own):
                continue
            own = spelled or own
        if own in entries:
            raise CheckpointError(f"{entries[own]} and {name} are the same entry")
        entries[own] = name
    return Network(place.prefix, entries, place.format is None)
