"""What the Triton kernels can take, and how an operator gets its Triton room."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Rows
from sparsecnx.backends.selection import selected
from sparsecnx.tensor import SparseTensor

MOST_CHANNELS = 2**16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x: Rows) -> str | None:
    """Why the Triton kernels cannot run on `x`; None where they can."""
    if x.dtype not in DTYPES:
        return f"Triton kernels take float32, bfloat16 and float16, x is {x.dtype}"
    if not 1 <= x.features.shape[1] <= MOST_CHANNELS:
        return f"Triton kernels take 1 to {MOST_CHANNELS} channels, x has {x.features.shape[1]}"
    if x.device.type == "cpu" and selected() != "triton":
        return "Triton kernels run on the CPU only when asked for by name, under TRITON_INTERPRET=1"
    return triton_launch.refusal(x.device)


def refusal_2d(x: SparseTensor) -> str | None:
    """As `refusal`, for kernels that are written for two spatial dimensions."""
    if x.layout.ndim != 2:
        return f"Triton kernel is two-dimensional, x has {x.layout.ndim} spatial dimensions"
    return refusal(x)


def implementation(
    package: str,
    function: str,
    rule: Callable[[Any], str | None] = refusal,
    detail: str | None = None,
) -> Implementation:
    """`function` of the room `triton.py` in an operator's `package`, imported only where Triton is installed; `detail`
    is the room's function that says how it runs on a given input, see `Implementation`."""
    if not triton_launch.available:
        return Implementation(_unavailable, rule)
    room = importlib.import_module(f"{package}.triton")
    return Implementation(getattr(room, function), rule, None if detail is None else getattr(room, detail))


def _unavailable(*_: object) -> None:
    raise AssertionError("refused")  # `refusal` keeps every call away
