"""Hold what a run trains: the network, its optimizer and its moving average, whole in every process or sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from sparsecnx.train.contents import PRETRAINING, Contents
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.masks import Drawn
from sparsecnx.train.options import Options
from sparsecnx.train.processes import Processes
from sparsecnx.train.schedule import BETAS
from sparsecnx.train.sharding import MOMENTS, shard, sharded_like
from sparsecnx.train.targets import IMAGE


class Pass(NamedTuple):
    """Hold what a forward pass takes, as it was read: `Learner.inputs` moves it to the device.

    Attributes:
        images: `(B, C, *size)`, NaN where there is no value, see `Batch`.
        targets: what else is predicted from them, by name.
        drawn: their masks; None where there are none.
        seed: of dropout and the like.
    """

    images: Tensor
    targets: dict[str, Tensor]
    drawn: Drawn | None
    seed: int


class Inputs(NamedTuple):
    """Hold the arguments of a forward pass on the device: normalised images, the others by name, and a seed."""

    images: Tensor
    given: dict[str, Any]
    seed: int


class Learner:
    """The network of a run, on the device of its process.

    Attributes:
        model: the masked autoencoder, not wrapped or compiled.
        average: its moving average, the teacher of `Recipe.ema_decay`, or None.
        kind: how the network is built and optimized.

    Args:
        recipe: decides the losses.
        options: only device, shard, compile, cuda_graphs and grad_checkpointing are read.
        processes: those that train the network together.
        saved: weights and optimizer to go on from; None for new ones.

    Raises:
        InputError: the network does not fit the recipe, or an option does not fit the network.
    """

    kind = PRETRAINING

    def __init__(self, recipe: Any, options: Options, processes: Processes, saved: Contents | None) -> None:
        self.recipe, self.options, self.processes = recipe, options, processes
        self.device = chosen_device(options.device, processes)
        torch.manual_seed(recipe.seed)
        self.model: Any = self.kind.build(recipe)
        if saved is not None:
            self.model.load_state_dict(saved.model)
        if options.grad_checkpointing:
            try:
                self.checkpoint_gradients()
            except (TypeError, AttributeError, AssertionError) as error:  # timm's networks that have none assert
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

    def checkpoint_gradients(self) -> None:
        """Let the network keep less for backward."""
        self.model.set_grad_checkpointing()

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
        groups = self.kind.groups(self.model, recipe)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=BETAS, fused=True)
        if saved is not None:
            self._load_optimizer(saved.optimizer)
        self.forward = self._wrapped()

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

    def backward(self, passes: Iterable[Pass]) -> tuple[Tensor, Tensor]:
        """Compute the losses of the forward passes of a step, and add up their gradients: those of all their images.

        Args:
            passes: they are read and moved to the device one by one. With targets all of them are read first, since
                the values of each target are counted together.

        Returns:
            The loss, and those of all targets of the recipe in their order, detached, `(1 + targets,)`. And how many
            patches or images each target has in a pass, `(targets,)`, or the share of the patches that count, `(1,)`:
            all 0 where there is nothing to learn from. Both are of all processes.
        """
        number, counts, found = self.recipe.grad_accum_steps, None, list[Tensor]()
        if self.recipe.targets is not None:
            passes = list(passes)
            counts = self._counts(passes)
        for held in passes:
            one = self.inputs(held)
            with self._averaging(len(found) == number - 1):
                losses = torch.stack(self.losses(one, counts))
                share = self.share(one) if counts is None else losses.new_ones(1)
                (losses[0] * share[0] / number).backward()
            found.append(torch.cat([losses.detach() * share, share]))
            del one, held  # before the next one is read and moved
        means = self.processes.mean(torch.stack(found).mean(0))
        losses, share = means[:-1], means[-1:]
        if counts is None:
            some = share.clamp(min=torch.finfo().tiny)
            losses = losses / some
            self._scale_gradients(1 / some[0])
        return losses, share if counts is None else counts

    def inputs(self, one: Pass) -> Inputs:
        """Move a pass to the device, and normalise its images."""
        images, drawn = self.normalized(one.images), one.drawn
        assert drawn is not None
        given: dict[str, Any] = {"mask": self.moved(drawn.mask), "visible": drawn.visible}
        given["valid"] = None if drawn.valid is None else self.moved(drawn.valid)
        if self.recipe.targets is not None:
            values = {IMAGE: images, **one.targets}
            given["targets"] = {name: self.moved(values[name]) for name in self.recipe.targets}
        return Inputs(images, given, one.seed)

    def normalized(self, images: Tensor) -> Tensor:
        """Return images on the device, normalised as the recipe says."""
        return normalize(self.moved(images), self.recipe)

    def moved(self, values: Tensor) -> Tensor:
        """Return a tensor on the device."""
        return values.to(self.device, non_blocking=True)

    def _counts(self, passes: Sequence[Pass]) -> Tensor:
        """Return the counts of the targets of passes, see `MPMAE.counts`, in the mean over them and the processes."""
        counts = []
        for one in passes:
            values = {name: self.moved({IMAGE: one.images, **one.targets}[name]) for name in self.recipe.targets or ()}
            assert one.drawn is not None
            counts.append(self.model.counts(values, self.moved(one.drawn.mask)))
        return self.processes.mean(torch.stack(counts).mean(0))

    @contextmanager
    def _averaging(self, last: bool) -> Iterator[None]:
        """Let gradients be averaged over the processes after the last pass of a step alone."""
        if self.options.shard:
            self.model.set_requires_gradient_sync(last)
        waits = isinstance(self.forward, DistributedDataParallel) and not last
        with self.forward.no_sync() if waits else nullcontext():
            yield

    def losses(self, one: Inputs, counts: Tensor | None) -> list[Tensor]:
        """Return the loss of a forward pass, and those of all targets.

        Args:
            one: its inputs.
            counts: of the targets, what their errors are divided by, see `MPMAE.forward`.
        """
        dtype = DTYPES[self.recipe.dtype]
        torch.manual_seed(one.seed)  # dropout and the like of other networks draw from here
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.network_losses(one, counts)

    def network_losses(self, one: Inputs, counts: Tensor | None) -> list[Tensor]:
        """Call the network, see `losses`."""
        if counts is None:
            return [self.forward(one.images, **one.given)[0]]
        found = self.forward(one.images, **one.given, counts=counts)
        return [found.loss, *found.losses.values()]

    def share(self, one: Inputs) -> Tensor:
        """Return the share of the patches of a forward pass that have a part in the loss, `(1,)`."""
        mask, valid = one.given["mask"], one.given["valid"]
        there = None if valid is None else patchify(valid, self.model.patch)
        return counted_patches(mask, self.model.loss_on, there).float().mean()[None]

    def _scale_gradients(self, factor: Tensor) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, a DTensor where they are sharded."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def update(self, lr: float, norm: Tensor) -> None:
        """Take an optimizer step with the gradients that are there, of norm `norm`, and clear them."""
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.clip_grad, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
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


def chosen_device(name: str, processes: Processes = Processes()) -> torch.device:  # noqa: B008 (it is frozen)
    """Return the device of an option, of several processes the own one of each: auto, cpu, cuda or cuda:1."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if name == "auto" else name)
    if device.type == "cuda" and processes.world > 1:
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
