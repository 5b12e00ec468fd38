"""Runs somebody's script such that its imports of MinkowskiEngine get this package."""

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
    """Run what the command line names, as `__main__`; its own exit code goes through."""
    arguments = list(argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nRuns code that is written against MinkowskiEngine without MinkowskiEngine.")
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
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))  # where python puts a script's own folder
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


class Arguments(list[str]):
    """`sys.argv`. A process that multiprocessing spawns, for a DataLoader or a launcher, reads it before it imports the
    script: reading it prepares that process too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arguments, (list(self),)


def _arguments(values: list[str]) -> Arguments:
    prepare()
    return Arguments(values)


def prepare() -> None:
    """Answer the imports of a script of MinkowskiEngine's days, and let it load its own checkpoints."""
    install()
    torch.serialization.add_safe_globals([argparse.Namespace])  # which they hold beside the weights
