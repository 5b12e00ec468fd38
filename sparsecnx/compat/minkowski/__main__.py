"""`python -m sparsecnx.compat.minkowski script.py ARGUMENTS...`: a script whose imports of MinkowskiEngine get this
package. `-m MODULE` in place of the script runs a module, as python's."""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsecnx.compat.minkowski.installation import install, write_stand_ins

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
    install()
    torch.serialization.add_safe_globals([argparse.Namespace])  # which their checkpoints hold beside the weights
    # Processes that multiprocessing spawns, of a DataLoader or a launcher, know what is on the path alone.
    with tempfile.TemporaryDirectory(prefix="sparsecnx-") as folder:
        write_stand_ins(Path(folder))
        sys.path.append(folder)
        sys.argv = arguments
        if as_module:
            sys.path[0] = ""
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(arguments[0]).resolve().parent)  # where python puts a script's own folder
            runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
