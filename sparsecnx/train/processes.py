"""The processes that train one network together: one, or those that torchrun starts.

Every process computes its part of each batch. Process 0 writes checkpoints and logs. What must not differ between them,
such as an error before the first step, is agreed on here, so that no process waits for one that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra, TrainingStopped
from sparsecnx.train.callbacks import LogError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are, on all machines.
        local_rank: its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Return whether this process writes."""
        return self.rank == 0

    def part(self, batch: Sequence[T]) -> Sequence[T]:
        """Return the part of a batch that this process computes."""
        size = len(batch) // self.world
        return batch[self.rank * size : (self.rank + 1) * size]

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, which may be any that can be pickled."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def numbers(self, *values: float) -> list[list[float]]:
        """Return numbers of all processes: of each the first, of each the second, and so on."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return own.view(-1, 1).tolist()
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        return torch.stack(found, dim=1).tolist()

    def largest(self, value: int) -> int:
        """Return the largest of the values of all processes."""
        if self.world == 1:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def lost(self, error: RuntimeError) -> bool:
        """Return whether an error says that another process is gone."""
        if self.world == 1:
            return False
        signs = ("closed by peer", "Connection reset", "Broken pipe", "Timed out")
        return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)

    def said_of_loss(self, error: RuntimeError) -> str:
        """Return an error for which `lost` is true in a few words."""
        return f"another process of the run ended ({str(error).partition(chr(10))[0][:200]})"

    def together(self, call: Callable[[], T]) -> T:
        """Return what a function returns, or raise in every process what it raises in one of them.

        Raises:
            InputError, LogError, MissingExtra, OSError, TrainingStopped: that of the first process that has one, which
                says it.
        """
        found, error = None, None
        try:
            found = call()
        except (InputError, LogError, MissingExtra, OSError, TrainingStopped) as raised:
            error = raised
        if not self.largest(error is not None):
            return found  # type: ignore[return-value]
        errors = self.gathered(OSError(str(error)) if isinstance(error, OSError) else error)  # some cannot be pickled
        first = next(rank for rank, one in enumerate(errors) if one is not None)
        if first == self.rank and error is not None:
            raise error
        said: Any = errors[first]
        said.elsewhere = True
        raise said from error

    def of_main(self, call: Callable[[], T]) -> T:
        """Return what a function returns in process 0, in all of them. It is not called in the others."""
        found = self.together(lambda: call() if self.main else None)
        return self.gathered(found)[0]  # type: ignore[return-value]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes of torchrun, if it started this one, until the end of the context.

    Raises:
        InputError: there are fewer GPUs on this machine than processes.
        TrainingStopped: the other processes cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    processes = Processes(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and processes.local_rank >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InputError("device", device, f"this machine has {there} GPUs; expected one for each of its processes")
    try:
        store, _, _ = next(iter(dist.rendezvous("env://")))
        # After a restart on one machine the store still holds the addresses of the processes that are gone. Several
        # machines count restarts each for itself: docs/scale.md gives torchrun a new store for each.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        attempt = dist.PrefixStore(restarts, store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=attempt, rank=processes.rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise TrainingStopped(f"the {world} processes cannot reach each other ({error})") from error
    try:
        yield processes
    finally:
        dist.destroy_process_group()
