"""The activations that a normalization can apply to its result, and what errors call it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# The kernels know an activation by its place in this table (csrc/cpu/kernels_site_norm.h, triton_kernels.py).
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "gelu": lambda z, _: F.gelu(z),
}
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")


PUBLIC = "batch, group or instance normalization"  # as errors call the operator of all three
