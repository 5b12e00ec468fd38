"""Errors that more than one package raises or catches."""

from __future__ import annotations


class InputError(ValueError):
    """An argument cannot work. Nothing was changed on disk.

    Attributes:
        argument: its name in Python; on the command line the same with dashes.
        problem: what it was, what is wrong with it and what would be right.
    """

    def __init__(self, argument: str, value: object, problem: str) -> None:
        self.argument = argument
        self.problem = f"is {value}: {problem}"
        super().__init__(argument, str(value), problem)  # unpickling calls the constructor with these

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class MissingExtra(ImportError):
    """An optional library is not installed; the message says how to install it."""


class CheckpointError(Exception):
    """A file is not a whole checkpoint; the message says why."""


class TrainingStopped(RuntimeError):
    """A run could not go on. Its last good checkpoint is still there, and the message names it."""
