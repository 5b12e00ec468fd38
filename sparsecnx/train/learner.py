"""Hold what a run trains: the network, its optimizer and its moving average, whole in every process or sharded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import InputError
from sparsecnx.models.patches import counted_patches, patchify
from sparsecnx.train.code import is_code
from sparsecnx.train.contents import Contents
from sparsecnx.train.masks import Drawn
from sparsecnx.train.networks import build_model
from sparsecnx.train.options import Options
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.schedule import BETAS, param_groups
from sparsecnx.train.sharding import MOMENTS, shard, sharded_like


class Pass(NamedTuple):
    """Hold what a forward pass takes, on the device.

    Attributes:
        images: normalised, `(B, C, *size)`, NaN where there is no value.
        targets: what else is predicted from them, by name.
        drawn: their masks.
        seed: of dropout and the like.
    """

    images: Tensor
    targets: dict[str, Tensor]
    drawn: Drawn
    seed: int


class Learner:
    """The network of a run, on the device of its process.

    Attributes:
        model: the masked autoencoder, not wrapped or compiled.
        average: its moving average, the teacher of `Recipe.ema_decay`, or None.

    Args:
        recipe: decides the losses.
        options: only device, shard, compile, cuda_graphs and grad_checkpointing are read.
        processes: those that train the network together.
        saved: weights and optimizer to go on from; None for new ones.

    Raises:
        InputError: the network does not fit the recipe, or an option does not fit the network.
    """

    def __init__(self, recipe: Recipe, options: Options, processes: Processes, saved: Contents | None) -> None:
        self.recipe, self.options, self.processes = recipe, options, processes
        self.device = _device(options.device, processes)
        torch.manual_seed(recipe.seed)
        self.model: Any = build_model(recipe)
        if saved is not None:
            self.model.load_state_dict(saved.model)
        if options.grad_checkpointing:
            try:
                self.model.set_grad_checkpointing()
            except (TypeError, AssertionError) as error:  # timm's networks that have none assert
                raise InputError("grad_checkpointing", True, f"{recipe.model} has none ({error})") from error
        if options.cuda_graphs and (recipe.grad_accum_steps > 1 or recipe.masks is not None):
            expected = "expected one forward pass a step and random masks, which keep shapes and memory as they are"
            raise InputError("cuda_graphs", True, expected)
        self.average: AveragedModel | None = None
        if recipe.ema_decay is not None:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            if saved is not None:
                self.average.module.load_state_dict(saved.ema)
                self.average.n_averaged.fill_(saved.step)

    def connect(self, saved: Contents | None) -> None:
        """Move the network to the device, divide it where it is sharded, and make the optimizer.

        All processes call this, after they have agreed that each of them can train.
        """
        recipe = self.recipe
        for network in (self.model, None if self.average is None else self.average.module):
            if network is not None and self.options.shard:
                shard(network, self.device.type)  # moves one part after the other
            elif network is not None:
                network.to(self.device)
        groups = param_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=BETAS, fused=True)
        if saved is not None:
            self._load_optimizer(saved.optimizer)
        self.forward = self._wrapped()
        self._complete = recipe.photographs and recipe.nodata is None  # every pixel has a value

    def _load_optimizer(self, saved: dict[int, dict[str, Tensor]]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {
            number: held | {key: sharded_like(held[key], parameters[number]) for key in MOMENTS}
            for number, held in saved.items()
        }
        # The rest of AdamW's state is the recipe's, so nothing else in the file has a say in it.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _wrapped(self) -> Any:
        """Return what is called for a loss: the model, compiled and with averaged gradients where that is asked for."""
        mode = "reduce-overhead" if self.options.cuda_graphs else "default"
        compiled = torch.compile(self.model, mode=mode) if self.options.compile or self.options.cuda_graphs else None
        called: Any = self.model if compiled is None else compiled
        if self.processes.world == 1 or self.options.shard:
            return called
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(called, device_ids=ids, gradient_as_bucket_view=True)

    def backward(self, passes: Iterable[Pass]) -> tuple[Tensor, Tensor | None]:
        """Compute the losses of the forward passes of a step, and add their gradients, averaged over the processes.

        Args:
            passes: they are taken one by one; all at first where they must be counted together.

        Returns:
            The loss, and those of all targets of the recipe in their order, detached, `(1 + targets,)`: their means
            over the processes are those of the whole step. And how many patches or images each target has in a pass,
            in the mean over all passes and processes, `(targets,)`; None without targets.
        """
        number, counts = self.recipe.grad_accum_steps, None
        if self.recipe.targets is not None or not self._alike:
            passes = list(passes)
            counts = self.processes.mean(torch.stack([self._counts(one) for one in passes]).mean(0))
        found: list[Tensor] = []
        for one in passes:
            last = len(found) == number - 1  # after which gradients are averaged
            if self.options.shard:
                self.model.set_requires_gradient_sync(last)
            waits = isinstance(self.forward, DistributedDataParallel) and not last
            with self.forward.no_sync() if waits else nullcontext():
                losses = self.losses(one, counts)
                (losses[0] / number).backward()
            found.append(torch.stack([loss.detach() for loss in losses]))  # copied: a CUDA graph reuses its memory
        return torch.stack(found).mean(0), None if self.recipe.targets is None else counts

    def losses(self, one: Pass, counts: Tensor | None) -> list[Tensor]:
        """Return the losses of a forward pass, whose mean over passes and processes is that of all their images.

        Args:
            one: the pass.
            counts: `_counts` in the mean over all passes and processes; None where they are alike.
        """
        dtype, drawn = DTYPES[self.recipe.dtype], one.drawn
        given: dict[str, Any] = {"mask": drawn.mask, "valid": drawn.valid, "visible": drawn.visible}
        if self.recipe.targets is not None:
            given |= {"targets": one.targets, "counts": counts}
        torch.manual_seed(one.seed)  # dropout and the like of other networks draw from here
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            found = self.forward(one.images, **given)
        if self.recipe.targets is not None:
            return [found.loss, *found.losses.values()]
        return [found[0] if counts is None else found[0] * (self._counts(one) / counts.clamp(min=1e-6))[0]]

    @property
    def _alike(self) -> bool:
        """Return whether all passes of a step, in all processes, have the same number of patches that count."""
        masked_alike = self.recipe.masks is None and self._complete
        return masked_alike or self.recipe.grad_accum_steps == self.processes.world == 1

    def _counts(self, one: Pass) -> Tensor:
        """Return how many patches or images have a part in the loss, or in that of each target, float32."""
        if self.recipe.targets is not None:
            counts: Tensor = self.model.counts(one.targets, one.drawn.mask)
            return counts
        there = None if one.drawn.valid is None else patchify(one.drawn.valid, self.model.patch)
        return counted_patches(one.drawn.mask, self.model.loss_on, there).sum().float()[None]

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, a DTensor where they are sharded."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def update(self, lr: float, norm: Tensor) -> None:
        """Take an optimizer step with the gradients that are there, of norm `norm`, and clear them."""
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.clip_grad, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        """Return model, optimizer and average for a checkpoint, with DTensors where they are sharded."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state["ema"] = self.average.module.state_dict()
        return state

    def describe(self) -> str:
        """Return how the processes divide a batch, and what depends on their number, for the first lines of a run."""
        world = self.processes.world
        each = self.recipe.batch_size // world
        line = f"{world} processes with {each} of the {self.recipe.batch_size} images of a batch each"
        line += ", parameters sharded" if self.options.shard else ""
        return "; ".join([line, *self.depends_on_processes()])

    def depends_on_processes(self) -> list[str]:
        """Return what makes the losses depend on the number of processes."""
        modules = list(self.model.modules())
        drawn = any(getattr(part, "p", 0) or getattr(part, "drop_prob", 0) for part in modules)
        causes = {
            "batch norm over the images of a process": any(isinstance(part, _BatchNorm) for part in modules),
            "GRN over the images of a process": self.recipe.grn_scope == "batch",
            "dropout of each process": drawn,
            "masks by a function of each process's images": is_code(self.recipe.masks),
        }
        return [cause for cause, there in causes.items() if there]


def whole(value: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a plain one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _device(name: str, processes: Processes) -> torch.device:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if name == "auto" else name)
    if device.type == "cuda" and processes.world > 1:
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
