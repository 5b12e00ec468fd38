"""What a run reads and writes and where it computes: the options that do not decide its losses."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from sparsecnx.common.errors import InputError
from sparsecnx.train.recipe import MANY


@dataclass(frozen=True)
class Options:
    """Data, output folder and device of a run; the recipe decides everything else.

    Attributes:
        data: folder of images or volumes, or torchvision:CLASS:ROOT, hf:NAME, wds:PATTERN or python:module:function;
            None for that of the resumed run, or for the photographs inside the wheels.
        output: folder of checkpoints and logs; None for that of the resumed checkpoint, or `runs/pretrain`.
        resume: a checkpoint; "newest" for the newest in `output`; "auto" for the same, or a new run if there is none.
        extend: epochs that a finished run is to be trained on, with a warm-up and a schedule of their own.
        small_data: take the defaults of `recipe.small_data` in place of the published ones.
        device: auto, cpu, cuda or one GPU such as cuda:1.
        workers: processes that read images; None for one per two cores, at most 8.
        compile: run the model through `torch.compile`.
        cuda_graphs: compile, and replay the kernels of a step as CUDA graphs (`mode="reduce-overhead"`), on a GPU.
        shard: divide parameters, gradients and optimizer between the processes of torchrun, by FSDP2.
        grad_checkpointing: keep less for backward, which computes it again.
        save_every: epochs between checkpoints, such as 0.1 for ten in each.
        keep: checkpoints kept.
        log: logs beside the terminal, TensorBoard and log.jsonl, separated by commas: wandb, mlflow, or module:factory,
            a Python function that returns a `callbacks.Callback`.
        draw_every: epochs between pictures of reconstructions; 0 for none, None for a tenth of the run.

    Raises:
        InputError: a field is out of range, or there is no CUDA device.
    """

    data: str | None = None
    output: str | None = None
    resume: str | None = None
    extend: int | None = None
    small_data: bool = False
    device: str = "auto"
    workers: int | None = None
    compile: bool = False
    cuda_graphs: bool = False
    shard: bool = False
    grad_checkpointing: bool = False
    save_every: float = 1
    keep: int = 3
    log: str | None = None
    draw_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError("keep", self.keep, "expected 1 or more")
        if not 0 < self.save_every < MANY:
            raise InputError("save_every", self.save_every, "expected more than 0 epochs")
        for field in ("workers", "draw_every"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise InputError(field, value, "expected 0 or more")
        for field in ("data", "output", "resume"):
            if getattr(self, field) == "":
                raise InputError(field, "''", "expected a name")
        if self.extend is not None and (not 1 <= self.extend <= MANY or self.resume is None):
            raise InputError("extend", self.extend, f"expected 1 to {MANY} epochs, together with --resume")
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise InputError("device", self.device, "expected auto, cpu, cuda or one GPU such as cuda:1")
        if self.device.startswith("cuda"):
            seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if seen == 0:
                raise InputError("device", self.device, "this torch sees no CUDA device; expected auto or cpu")
            if int(self.device.partition(":")[2] or 0) >= seen:
                raise InputError("device", self.device, f"this torch sees cuda:0 to cuda:{seen - 1}")
        if self.cuda_graphs and (self.device == "cpu" or not torch.cuda.is_available()):
            raise InputError("cuda_graphs", True, "expected together with a CUDA device")
        if ":" in self.device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("device", self.device, "expected cuda, of which each process takes its own")
        if self.shard and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise InputError("shard", True, "expected several processes, started by torchrun")
