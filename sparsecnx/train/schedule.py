"""The optimizer of the published recipes: its groups of parameters, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

BETAS = (0.9, 0.95)


def learning_rate(step: int, *, peak: float, warmup_steps: float, total_steps: int, least: float = 0.0) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear to `peak`, then half a cosine to `least`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return least + (peak - least) * 0.5 * (1.0 + math.cos(math.pi * progress))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's two groups: matrices and filters decay, biases and vectors do not.

    A vector has one side larger than 1, as GRN's `(1, 1, 1, C)` and the mask token's `(1, C, 1, 1)` have.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = sum(side > 1 for side in parameter.shape) <= 1
            groups[vector or name.endswith("bias")].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
