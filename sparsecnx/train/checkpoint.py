"""The checkpoints of a run.

    runs/demo/checkpoint-00000540.pt     state after 540 optimizer steps; the newest K are kept
    runs/demo/last.pt                    link to the newest

Each is written whole or not at all, and reading it runs no code, see `sparsecnx.common.torch_files`. A run whose
parameters are sharded writes folders under these names, see sharding.py.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.files import sync
from sparsecnx.common.sharded_files import read_sharded
from sparsecnx.common.torch_files import load_torch, save_torch
from sparsecnx.train import sharding
from sparsecnx.train.processes import Processes

LAST = "last.pt"
_NAME = re.compile(r"checkpoint-(\d+)\.pt")
_PARTS = {"model", "optimizer", "step", "epoch", "recipe", "data"}


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: folder of the run. It must exist when a checkpoint is saved: a run never makes its folder again.
        keep: number of checkpoints that stay.
    """

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """Return the checkpoints by step, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name[len("checkpoint-") : -len(".pt")]))

    def newest(self) -> Path | None:
        """Return the checkpoint of the latest step, or None if there is none."""
        return next(reversed(self.all()), None)

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `state["step"]`, point `last.pt` at it, and delete old ones.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        path = self.folder / f"checkpoint-{state['step']:08d}.pt"
        save_torch(path, state)
        self._point_at(path)
        return path

    def save_sharded(self, state: dict[str, Any], processes: Processes) -> None:
        """Write the state of several processes, which all call this, as `save` does.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        path = self.folder / f"checkpoint-{state['step']:08d}.pt"
        sharding.save(path, state, processes)
        if processes.main:
            self._point_at(path)

    def _point_at(self, path: Path) -> None:
        """Point `last.pt` at the newest checkpoint, and delete old ones."""
        link = self.folder / f".{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.folder / LAST)
        for old in self.all()[: -self.keep]:
            _remove(old)
        sync(self.folder)

    def drop_leftovers(self) -> None:
        """Delete half-written files of a run that was killed while saving."""
        for leftover in [*self.folder.glob(".checkpoint-*.pt.tmp"), self.folder / f".{LAST}.tmp"]:
            _remove(leftover)


def _remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        # A kill in the middle leaves it under the name of a leftover, and no damaged checkpoint.
        leftover = path if path.name.startswith(".") else path.with_name(f".{path.name}.tmp")
        os.replace(path, leftover)
        shutil.rmtree(leftover)
    else:
        path.unlink(missing_ok=True)


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `sparsecnx pretrain` onto the CPU. `contents.check` looks at what it holds.

    Returns:
        `model`, `optimizer`: state dicts; `step`: optimizer steps done; `epoch`: the same in epochs; `recipe`: the
        fields of `Recipe`; `data`: folder of the images, their number and hashes of names, sizes and contents.

    Raises:
        CheckpointError: there is no such file, it is truncated or damaged, or it is not a checkpoint of
            `sparsecnx pretrain`.
    """
    state = read_sharded(Path(path)) if os.path.isdir(path) else load_torch(path)
    missing = sorted(_PARTS - state.keys() if isinstance(state, dict) else _PARTS)
    if missing:
        raise CheckpointError(f"not a checkpoint of sparsecnx pretrain: it lacks {', '.join(missing)}")
    return state
