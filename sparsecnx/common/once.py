"""Remember what a function of plain numbers returned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K")
V = TypeVar("V")

MOST_KEPT = 4096  # results of one function: images of ever other sizes would fill the memory
_MISSING = object()


def once(function: F) -> F:
    """Return a function that computes its result once for the same arguments; it keeps those that have a hash.

    torch.compile goes into the function itself: it warns of functools.cache.
    """
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def remembered(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            found = known.get(args, _MISSING)
        except TypeError:  # Sizes that torch traces have no hash.
            return function(*args)
        return remember(known, args, function(*args)) if found is _MISSING else found

    return remembered  # type: ignore[return-value]


def remember(known: dict[K, V], key: K, value: V) -> V:
    """Keep a value by its key, and return it. Where there are MOST_KEPT, these are forgotten."""
    if len(known) >= MOST_KEPT:
        known.clear()
    known[key] = value
    return value
