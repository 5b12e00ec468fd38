"""Remember what a function of plain numbers returned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def once(function: F) -> F:
    """Return a function that computes its result once for the same arguments, which must be hashable.

    torch.compile goes into the function itself: it warns of functools.cache.
    """
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def remembered(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        if args not in known:
            known[args] = function(*args)
        return known[args]

    return remembered  # type: ignore[return-value]
