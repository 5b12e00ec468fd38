"""What the API raises. MinkowskiEngine asserts, Python's callers expect ValueError or TypeError: both catch these."""

from __future__ import annotations

from typing import Any


class ArgumentError(AssertionError, ValueError):
    """An argument of the right kind that does not fit."""


class ArgumentTypeError(AssertionError, TypeError):
    """An argument of the wrong kind."""


class NotOffered(NotImplementedError):
    """A part of MinkowskiEngine that is not offered here; the message names what comes nearest."""


def not_offered(name: str, nearest: str) -> NotOffered:
    """The error for MinkowskiEngine's `name`; `nearest` says what to use in its place."""
    return NotOffered(f"{name} of MinkowskiEngine is not offered by sparsecnx.compat.minkowski. Nearest: {nearest}")


def insist(holds: bool, message: str) -> None:
    """Raises ArgumentError unless it holds."""
    if not holds:
        raise ArgumentError(message)


def insist_type(value: object, kinds: type | tuple[type, ...], name: str, expected: str) -> None:
    """Raises ArgumentTypeError unless the argument `name` is an instance of `kinds`."""
    if not isinstance(value, kinds):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}: expected {expected}")


def placeholder(name: str, nearest: str) -> type:
    """A class in place of a part that is not offered: it imports and serves in `isinstance`; calling it raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise not_offered(name, nearest)

    return type(name, (), {"__init__": refuse, "apply": staticmethod(refuse), "__doc__": f"Not offered: {nearest}"})
