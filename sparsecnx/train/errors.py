"""What can go wrong, sorted by whose turn it is: the caller's to change an argument, or the run's to stop."""

from __future__ import annotations

import importlib.util
import sys


class InputError(ValueError):
    """An argument that cannot work. Nothing was changed on disk.

    Attributes:
        argument: its name in Python; on the command line the same with dashes.
        problem: what it was, what is wrong with it and what would be right.
    """

    def __init__(self, argument: str, value: object, problem: str) -> None:
        self.argument = argument
        self.problem = f"is {value}: {problem}"
        super().__init__(argument, str(value), problem)  # what unpickling calls the constructor with

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class TrainingStopped(RuntimeError):
    """A run that could not go on; its last good checkpoint is still there, and named in the message."""


class MissingExtra(ImportError):
    """A library of the extra `[train]` is not installed."""


def printable(text: str) -> str:
    """`text` with what standard output cannot encode, such as a file name in another encoding, escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def require_train_extra() -> None:
    """Raise `MissingExtra` with the command that helps, unless every library of `[train]` is installed."""
    wanted = ("torchvision", "tensorboard", "tqdm", "matplotlib", "skimage", "sklearn")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)} not installed: pip install sparsecnx[train]")
