"""The backend that the user asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "minkowski")
OLD_NAMES = {"native": "cpu"}

_selected = "auto"


def selected() -> str:
    """Return the name of the backend in force, one of `BACKENDS`."""
    return _selected


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operators inside the `with` block on one backend. Process-wide, like `torch.backends` flags.

    An operator that the backend offers runs there, or raises `BackendError` with the reason. `cuda` and `minkowski`
    offer convolutions only: under them every other operator runs as under `auto`.

    Args:
        name: `auto` (default), `reference`, `cpu`, `cuda`, `triton` or `minkowski`; `native` is the old name of `cpu`.

    Raises:
        ValueError: `name` is none of these.
    """
    global _selected
    name = OLD_NAMES.get(name, name)
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: expected one of {', '.join(BACKENDS)}")
    previous = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = previous
