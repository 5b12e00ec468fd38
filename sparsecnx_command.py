"""The command `sparsecnx`, outside the package, so that it can say in one line why the package does not import."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `sparsecnx.cli.main`, and return the exit code."""
    try:
        from sparsecnx.cli import main as run

        return run()
    except ImportError as error:
        if error.name != "sparsecnx":  # The package names itself where it lacks what it needs.
            raise
        print(f"sparsecnx: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # `run` reports its own.
        print("sparsecnx: interrupted", file=sys.stderr)
        return 130
