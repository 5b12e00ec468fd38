"""Open what an address of `--data` names, see address.py."""

from __future__ import annotations

from pathlib import Path

from sparsecnx.common.errors import MissingExtra
from sparsecnx.train.data.address import Address, absolute, parse
from sparsecnx.train.data.items import open_hugging_face, open_python, open_torchvision
from sparsecnx.train.data.source import Source


def open_source(data: str) -> Source | None:
    """Return the source of an address; None for the name of a folder.

    Raises:
        InputError: the address is wrong, or what it names cannot be read.
        MissingExtra: a library is not installed.
    """
    address = parse(data)
    if address is None:
        return None
    opener = {
        "torchvision": open_torchvision,
        "hf": open_hugging_face,
        "wds": open_shards,
        "python": open_python,
    }[address.kind]
    return opener(address)


def open_shards(address: Address) -> Source:
    """Return the samples of shards: `wds:PATTERN?image=jpg&window=8&cache=FOLDER&cache_gb=64`.

    Raises:
        InputError: a shard is missing, unreadable or empty, or an option is wrong.
        MissingExtra: the package `webdataset` is not installed.
    """
    try:
        import webdataset  # noqa: F401

        from sparsecnx.train.data.shard_files import find_shards
        from sparsecnx.train.data.shards import COPIED_GB, WINDOW, ShardSource
    except ImportError as error:
        problem = f"{address} needs webdataset, which is not installed: pip install sparsecnx[webdataset]"
        raise MissingExtra(problem) from error
    address.expect_options("image", "window", "cache", "cache_gb")
    window, cache_gb = (_number(address, *option) for option in (("window", WINDOW), ("cache_gb", COPIED_GB)))
    cache = address.options.get("cache")
    shards = find_shards(address.what)
    parts = [absolute(part) for part in address.what.split("::")]
    return ShardSource(
        str(address._replace(what="::".join(parts))),
        shards,
        image=address.options.get("image"),
        window=int(window),
        cache=None if cache is None else Path(cache, "sparsecnx-shards"),
        cache_gb=cache_gb,
    )


def _number(address: Address, name: str, default: float) -> float:
    text = address.options.get(name, str(default))
    try:
        number = type(default)(text)
    except ValueError:
        number = type(default)(0)
    if not 0 < number < 1e9:
        kind = "a whole number, 1 or more" if isinstance(default, int) else "a number of 10^9 bytes, more than 0"
        raise address.refuse(f"has the option {name}={text}; expected {kind}")
    return number
