"""A model whose parameters are divided between processes, and its checkpoints.

Parameters, gradients and the state of the optimizer are sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`). A
checkpoint of them is a folder that every process writes its part into, by `torch.distributed.checkpoint`, as files of
safetensors, so that reading one runs no code:

    checkpoint-00000540.pt/shard-00001-model-00001-of-00001.safetensors      tensors of process 0
    checkpoint-00000540.pt/run.pt                                            step, recipe, data, checksums of the others

It is read whole (`sparsecnx.common.sharded_files`), and so by any number of processes, sharded or not.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsecnx.common.files import sync
from sparsecnx.common.sharded_files import CHECKSUMS, MOMENTS, RUN, checksum
from sparsecnx.common.torch_files import save_torch
from sparsecnx.nn import ConvNeXtV2Block
from sparsecnx.train.processes import Processes


def shard(model: nn.Module) -> None:
    """Divide the parameters of a model between all processes: each block by itself, and what is left together."""
    # The prediction is a view, and nothing is written into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in _blocks(model):
        fully_shard(part)
    fully_shard(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: ours, or else the elements of its lists and sequences of modules."""
    ours: list[nn.Module] = [part for part in model.modules() if isinstance(part, ConvNeXtV2Block)]
    if ours:
        return ours
    sequences = [part for part in model.modules() if isinstance(part, (nn.Sequential, nn.ModuleList))]
    innermost = [part for part in sequences if not any(s is not part and s in set(part.modules()) for s in sequences)]
    return [part for part in innermost if any(True for _ in part.parameters())]


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a tensor that all processes have, as a parameter is divided."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def save(path: Path, state: dict[str, Any], processes: Processes) -> None:
    """Write a checkpoint as a folder. Every process calls this.

    Raises:
        OSError: it could not be written; nothing is there under this name.
    """
    part = path.with_name(f".{path.name}.tmp")
    processes.of_main(lambda: _emptied(part))
    tensors = {f"{name}.{entry}": value for name in ("model", "ema") for entry, value in state.get(name, {}).items()}
    for number, held in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{key}": held[key] for key in MOMENTS}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(part), save_distributed=True))
    except dcp.api.CheckpointException as error:  # raised in all processes
        raise OSError(str(error).strip().splitlines()[-1]) from error
    checksums: dict[str, int] = {}
    for found in processes.gathered(processes.together(lambda: _synced(part, processes.rank))):
        checksums |= found
    rest = {name: value for name, value in state.items() if name not in ("model", "ema")}
    groups = {"param_groups": state["optimizer"]["param_groups"]}
    processes.of_main(lambda: save_torch(part / RUN, rest | {"optimizer": groups, CHECKSUMS: checksums}))
    processes.of_main(lambda: os.replace(part, path))


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _synced(folder: Path, rank: int) -> dict[str, int]:
    """Force the files of a process to disk, and return their checksums by their names."""
    own = [file for file in folder.iterdir() if file.name.startswith(f"shard-{rank + 1:05d}-")]
    for file in own:
        sync(file)
    return {file.name: checksum(file) for file in own}
