"""The backend that the user asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

BACKENDS = ("auto", "reference", "native", "cuda", "triton", "minkowski")

_selected = "auto"


def selected() -> str:
    """Name of the backend in force, one of `BACKENDS`."""
    return _selected


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operators inside the `with` block on one backend. Process-wide, like `torch.backends` flags.

    Args:
        name: `auto` (default), `reference`, `native`, `cuda`, `triton` or `minkowski`.

    Raises:
        ValueError: `name` is none of these.
    """
    global _selected
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: expected one of {', '.join(BACKENDS)}")
    previous = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = previous
