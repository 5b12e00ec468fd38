"""Checkpoints that several processes wrote, each its part, as folders of safetensors files: see train/sharding.py."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.files import not_regular
from sparsecnx.common.torch_files import load_torch

RUN = "run.pt"
CHECKSUMS = "checksums"
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_STEP = 2**24  # AdamW counts its steps in float32, which holds whole numbers up to this one


def is_sharded(path: Path) -> bool:
    """Return whether a path is the folder of such a checkpoint."""
    return (path / RUN).is_file()


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with open(file, "rb") as opened:
        while part := opened.read(2**22):
            found = zlib.crc32(part, found)
    return found


def read_sharded(path: Path) -> dict[str, Any]:
    """Return the contents of a folder, whole and on the CPU, as those of a checkpoint in one file.

    Raises:
        CheckpointError: a part is missing or damaged, or it is no such folder.
    """
    if not is_sharded(path):
        raise CheckpointError(f"a folder without {RUN}; expected a checkpoint")
    import torch.distributed.checkpoint as dcp  # half a second, which `import sparsecnx` does without

    state = load_torch(path / RUN)
    _expect_whole(path, state)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return _nested(state, tensors)
    except Exception as error:  # safetensors and torch raise many kinds of errors
        raise CheckpointError(f"{path.name}: damaged ({error})") from error


def _expect_whole(path: Path, state: Any) -> None:
    """Raise CheckpointError unless every file that was written is there as it was."""
    checksums = state.get(CHECKSUMS) if isinstance(state, dict) else None
    if not isinstance(checksums, dict) or not all(isinstance(name, str) and "/" not in name for name in checksums):
        raise CheckpointError(f"{path.name}/{RUN} holds no checksums of the other files: expected a checkpoint")
    unlisted = {file.name for file in path.glob("*.safetensors")} - set(checksums)
    if unlisted:
        raise CheckpointError(f"{path.name} holds {min(unlisted)}, which the run did not write")
    for name, expected in checksums.items():
        if not_regular(path / name) is not None or checksum(path / name) != expected:
            raise CheckpointError(f"{path.name}: {name} is missing or damaged")


def _nested(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state with model, average and moments, whose tensors have names such as `optimizer.3.exp_avg`."""
    count = torch.tensor(float(min(state["step"], LARGEST_STEP)))
    parts: dict[str, dict[str, Tensor]] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part == "optimizer":
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {"step": count.clone()})[moment] = tensor
        else:
            parts.setdefault(part, {})[name] = tensor
    rest = {name: value for name, value in state.items() if name != CHECKSUMS}
    return rest | parts | {"optimizer": state["optimizer"] | {"state": moments}}
