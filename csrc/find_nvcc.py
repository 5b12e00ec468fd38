"""The one search for nvcc: what setup.py compiles with, what the Makefile decides by and what the tests compile with.

As a program it prints the path, or fails and says where it looked. It runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

VARIABLES = ("CUDA_HOME", "CUDA_PATH")
USUAL_TOOLKIT = Path("/usr/local/cuda")


def find_nvcc() -> str | None:
    """Path of nvcc. An environment variable that points to a folder without it is passed over."""
    homes = [Path(os.environ[name], "bin/nvcc") for name in VARIABLES if os.environ.get(name)]
    on_path = [Path(path) for path in [shutil.which("nvcc")] if path is not None]
    candidates = [*homes, *on_path, USUAL_TOOLKIT / "bin/nvcc"]
    return next((str(file) for file in candidates if os.access(file, os.X_OK)), None)


def looked_in() -> str:
    """Where the search looks, for messages."""
    homes = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    return ", ".join([*homes, "PATH", str(USUAL_TOOLKIT)])


if __name__ == "__main__":
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit(f"no nvcc: looked in {looked_in()}")
    print(nvcc)
