"""Errors of the API. MinkowskiEngine asserts, Python raises ValueError or TypeError: `except` clauses for both work."""

from __future__ import annotations


class ArgumentError(AssertionError, ValueError):
    """An argument has the right type and a value that does not fit."""


class ArgumentTypeError(AssertionError, TypeError):
    """An argument has the wrong type."""


class NotOffered(NotImplementedError):
    """A part of MinkowskiEngine is not offered here; the message names the nearest alternative."""


def not_offered(name: str, nearest: str) -> NotOffered:
    """Return the error for the part `name` of MinkowskiEngine; `nearest` says what to use instead."""
    return NotOffered(f"{name} of MinkowskiEngine is not offered by sparsecnx.compat.minkowski. Nearest: {nearest}")


def require(holds: bool, message: str) -> None:
    """Raise ArgumentError unless `holds`."""
    if not holds:
        raise ArgumentError(message)


def require_type(value: object, kinds: type | tuple[type, ...], name: str, expected: str) -> None:
    """Raise ArgumentTypeError unless the argument `name` is an instance of `kinds`."""
    if not isinstance(value, kinds):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}: expected {expected}")
