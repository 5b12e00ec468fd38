"""Errors that more than one package raises or catches.

Where several processes have the same error, all but one of them set `elsewhere`: another says it.

Text from files gets into their messages. What does not print is escaped, so that it cannot steer a terminal.
"""

from __future__ import annotations

from sparsecnx.common.files import escape

MOST_LETTERS = 2000  # of a message about a file, which can hold names of any length


class InputError(ValueError):
    """An argument cannot work. Nothing was changed on disk.

    Attributes:
        argument: its name in Python; on the command line the same with dashes.
        problem: what it was, what is wrong with it and what would be right.
    """

    elsewhere = False

    def __init__(self, argument: str, value: object, problem: str) -> None:
        self.argument = argument
        self.problem = escape(f"is {value}: {problem}")
        super().__init__(argument, str(value), problem)  # unpickling calls the constructor with these

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class MissingExtra(ImportError):
    """An optional library is not installed; the message says how to install it."""

    elsewhere = False


class CheckpointError(Exception):
    """A file is not a whole checkpoint; the message says why."""

    def __str__(self) -> str:
        text = escape(super().__str__())
        return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS // 2]} ... {text[-MOST_LETTERS // 2 :]}"


class TrainingStopped(RuntimeError):
    """A run could not go on. Its last good checkpoint is still there, and the message names it."""

    elsewhere = False

    def __str__(self) -> str:
        return escape(super().__str__())
