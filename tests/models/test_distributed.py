"""Tests of models wrapped by torch.distributed: two processes train as one does on the whole batch."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from sparsecnx import SparseTensor, models
from sparsecnx.compat import minkowski
from sparsecnx.nn import ConvNeXtV2Block

WHOLE = StateDictOptions(full_state_dict=True)


class MinkowskiNetwork(nn.Module):
    """Layers of MinkowskiEngine's API, which take and return tensors of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            minkowski.MinkowskiConvolution(3, 4, kernel_size=2, stride=2, dimension=2),
            minkowski.MinkowskiReLU(),
            minkowski.MinkowskiConvolution(4, 4, kernel_size=3, dimension=2),
        )

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> minkowski.SparseTensor:
        x = SparseTensor.from_dense(images[..., :8, :12], mask)
        return self.layers(minkowski.SparseTensor(x.features, x.coordinates))


def build(model: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model that every process starts from."""
    torch.manual_seed(0)
    if model == "minkowski":
        return MinkowskiNetwork().to(dtype)
    encoder = models.ConvNeXtV2Encoder(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16))
    built = models.FCMAE(encoder, decoder_dim=16) if model == "fcmae" else encoder
    for name, parameter in built.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter)
    return built.to(dtype)


def shard(module: nn.Module, parts: type[nn.Module] | None = None, **options: Any) -> nn.Module:
    """Shard all parts of this type, then what is left."""
    for part in list(module.modules()):
        if parts is not None and isinstance(part, parts):
            fully_shard(part, **options)
    return fully_shard(module, **options)


def checkpointed(module: Any) -> nn.Module:
    module.set_grad_checkpointing()
    return module


WRAPPERS: dict[tuple[str, str], Callable[[nn.Module], nn.Module]] = {
    ("encoder", "DDP"): DistributedDataParallel,
    ("encoder", "DDP, unused parameters"): lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    ("encoder", "DDP, static graph"): lambda model: DistributedDataParallel(model, static_graph=True),
    ("encoder", "fully_shard of layers"): lambda model: shard(model, nn.Linear),
    ("encoder", "fully_shard of stages"): lambda model: shard(model, nn.Sequential),
    ("encoder", "fully_shard of blocks, checkpointing"): lambda model: shard(checkpointed(model), ConvNeXtV2Block),
    ("fcmae", "DDP"): DistributedDataParallel,
    ("fcmae", "DDP, unused parameters"): lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    ("fcmae", "DDP, checkpointing"): lambda model: DistributedDataParallel(checkpointed(model)),
    ("fcmae", "fully_shard of blocks"): lambda model: shard(model, ConvNeXtV2Block),
    ("fcmae", "FSDP of blocks"): lambda model: FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({ConvNeXtV2Block}), device_id=torch.device("cpu"), use_orig_params=True
    ),
    ("minkowski", "DDP, unused parameters"): lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    ("minkowski", "DDP, static graph"): lambda model: DistributedDataParallel(model, static_graph=True),
    ("minkowski", "fully_shard of layers"): lambda model: shard(model, minkowski.MinkowskiConvolution),
}


def train(model: nn.Module, images: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Take two steps and return the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        out = model(images, mask=mask)
        loss = out[0] if isinstance(out, tuple) else out.F.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images.to(dtype), torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 0, 1], [1, 1, 0]]]).bool()


def case(model: str, wrapper: str) -> dict[str, Any]:
    """Return the mean losses and the weights after training one image of two in each process."""
    images, mask = (tensor[dist.get_rank(), None] for tensor in data())
    wrapped = WRAPPERS[model, wrapper](build(model))
    losses = torch.tensor(train(wrapped, images, mask), dtype=torch.float64)
    dist.all_reduce(losses)
    state = get_model_state_dict(wrapped, options=WHOLE)
    if dist.get_rank() == 0:
        build(model).load_state_dict(state)
    return {"losses": losses / dist.get_world_size(), "state": state}


def low_precision() -> dict[str, Any]:
    """Return losses with bfloat16 parameters, and the dtype of what the sharded encoder returns."""
    images, mask = (tensor[dist.get_rank(), None] for tensor in data(torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    losses = torch.tensor(train(shard(build("fcmae", torch.float32), ConvNeXtV2Block, mp_policy=policy), images, mask))
    dist.all_reduce(losses)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    encoder = fully_shard(build("encoder", torch.float32), mp_policy=policy)
    return {"losses": losses / dist.get_world_size(), "dtype": encoder(images, mask).dtype}


class Normalised(nn.Module):
    """A convolution and batch normalization, over the visible sites of both images or of one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(5, dtype=torch.float64)
        self.act = nn.SiLU()

    def forward(self, x: SparseTensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))).features


def normalised(images: torch.Tensor, mask: torch.Tensor, synchronised: bool) -> dict[str, Any]:
    """Return the outputs, the gradients and the running statistics of a normalised network."""
    torch.manual_seed(0)
    model: nn.Module = Normalised()
    nn.init.normal_(model.norm.weight)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    images = images.clone().requires_grad_()
    out = model(SparseTensor.from_dense(images, mask))
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    (out.square() * weights).sum().backward()
    grads = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    return {"rows": out.detach(), "images": images.grad, **grads, **model.state_dict()}


def sync_batch_norm() -> dict[str, Any]:
    """Normalise one image in each process: they have other numbers of visible sites."""
    images, mask = (tensor[dist.get_rank(), None] for tensor in data())
    found = normalised(images, mask, synchronised=True)
    for name, value in found.items():
        if name.startswith("gradient of"):
            dist.all_reduce(value)
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, (found["rows"], found["images"]))
    return {**found, "rows": torch.cat([part[0] for part in parts]), "images": torch.cat([part[1] for part in parts])}


def weights_come_back() -> dict[str, Any]:
    """Return the weights of a sharded model that was given those of another."""
    expected = build("fcmae").state_dict()
    sharded = shard(build("fcmae"), ConvNeXtV2Block)
    nn.init.zeros_(sharded.mask_token)
    set_model_state_dict(sharded, expected, options=WHOLE)
    return {"state": get_model_state_dict(sharded, options=WHOLE)}


def work(rank: int, folder: Path) -> None:
    """Run every case in one of two processes. The first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    init_device_mesh("cpu", (2,))
    cases = {name: (case, *name) for name in WRAPPERS}
    cases |= {("low precision",): (low_precision,), ("weights come back",): (weights_come_back,)}
    cases |= {("sync batch norm",): (sync_batch_norm,)}
    for name, (function, *arguments) in cases.items():
        try:
            found: Any = function(*arguments)
        except Exception:
            found = traceback.format_exc()
        if rank == 0:
            torch.save(found, folder / "-".join(name))
    os._exit(0)  # Leaving Python in order takes seconds.


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return a function that reads what the two processes found. A crash of one ends the other."""
    folder = tmp_path_factory.mktemp("distributed")
    ended = None
    try:
        mp.start_processes(work, (folder,), nprocs=2, start_method="spawn")
    except mp.ProcessExitedException as error:
        ended = str(error)

    def read(*name: str) -> dict[str, Any]:
        path = folder / "-".join(name)
        result = torch.load(path, weights_only=False) if path.exists() else ended
        assert isinstance(result, dict), result
        return result

    return read


@pytest.mark.parametrize(("model", "wrapper"), WRAPPERS)
def test_two_processes_train_as_one(found, model, wrapper):
    alone, result = build(model), found(model, wrapper)
    torch.testing.assert_close(result["losses"].tolist(), train(alone, *data()), rtol=1e-9, atol=0)
    assert result["state"].keys() == alone.state_dict().keys()
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(result["state"][name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_low_precision_parameters(found):
    result = found("low precision")
    expected = train(build("fcmae"), *data())
    torch.testing.assert_close(result["losses"].tolist(), expected, rtol=2e-2, atol=0)
    assert result["dtype"] == torch.float32


def test_weights_of_a_whole_model_are_sharded_and_come_back(found):
    state = found("weights come back")["state"]
    assert all(torch.equal(state[name], weight) for name, weight in build("fcmae").state_dict().items())


def test_sync_batch_norm_normalises_over_all_processes(found):
    result, alone = found("sync batch norm"), normalised(*data(), synchronised=False)
    assert result.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(result[name], expected, rtol=1e-9, atol=1e-12, msg=name)
