"""Running a script so that its imports of MinkowskiEngine find this package."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsecnx.compat.minkowski.installation import install

USAGE = "usage: python -m sparsecnx.compat.minkowski (SCRIPT | -m MODULE) [ARGUMENTS...]"


def main(argv: Sequence[str]) -> int:
    """Run the script or module of a command line as `__main__`, and return its exit code."""
    arguments = list(argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nRuns code for MinkowskiEngine without MinkowskiEngine.")
        return 0
    as_module = bool(arguments) and arguments[0] == "-m"
    if as_module:
        arguments = arguments[1:]
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    if not as_module and not Path(arguments[0]).is_file():
        print(f"{USAGE}\nSCRIPT is {arguments[0]}: there is no such file", file=sys.stderr)
        return 2
    sys.argv = Arguments(arguments)
    prepare()
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))  # as python does for a script
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


class Arguments(list[str]):
    """A `sys.argv` that prepares spawned processes.

    multiprocessing sends `sys.argv` to a process, which unpickles it before it imports the script.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _arguments, (list(self),)


def _arguments(values: list[str]) -> Arguments:
    prepare()
    return Arguments(values)


def prepare() -> None:
    """Install the package as MinkowskiEngine, and let old scripts load their own checkpoints."""
    install()
    torch.serialization.add_safe_globals([argparse.Namespace])  # they hold one beside the weights
