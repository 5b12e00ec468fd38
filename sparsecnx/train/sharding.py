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

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsecnx.common.files import sync
from sparsecnx.common.sharded_files import CHECKSUMS, MOMENTS, RUN, checksum
from sparsecnx.common.torch_files import save_torch
from sparsecnx.nn.block import FusedBlock
from sparsecnx.train.processes import Processes

PARTS = 16  # a network is divided into about so many, or more
SMALL = 64  # parts smaller than one by this are not gathered by themselves


def shard(model: Any, device: str) -> None:
    """Divide the parameters of a network between all processes, each part by itself, on a type of device."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    # The prediction is a view, and nothing is written into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    most = sum(parameter.numel() for parameter in model.parameters()) // PARTS
    # An encoder is no part itself: features are taken from it without calling it.
    encoder = getattr(model, "encoder", nn.Identity())
    others = nn.ModuleList(child for child in model.children() if child is not encoder)
    for part in (*parts_of(encoder, most), *parts_of(others, most)):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parts_of(module: nn.Module, most: int) -> list[nn.Module]:
    """Return the parts of a network that are gathered one after the other.

    They are our blocks, which read the parameters of their layers without calling them, and of other networks modules
    of at most so many parameters, with what is larger but has no parts. A small rest stays with the whole.
    """
    found: list[nn.Module] = []
    for child in module.children():
        count = sum(parameter.numel() for parameter in child.parameters())
        called = not isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
        alone = isinstance(child, FusedBlock) or count <= most or next(child.children(), None) is None
        if called and alone and count > most // SMALL:
            found.append(child)
        elif not called or not alone:
            found += parts_of(child, most)
    return found


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
    processes.of_main(lambda: sync(path.parent))


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _synced(folder: Path, rank: int) -> dict[str, int]:
    """Force the files of a process to disk, and return their checksums by their names."""
    own = [file for file in folder.iterdir() if file.name.startswith(f"shard-{rank + 1:05d}-")]
    for file in own:
        sync(file)
    return {file.name: checksum(file) for file in own}
