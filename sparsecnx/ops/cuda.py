"""What the CUDA C++ kernels can take, and how an operator gets its CUDA room."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from sparsecnx.backends import compiled, cuda
from sparsecnx.backends.dispatch import Implementation
from sparsecnx.backends.selection import selected
from sparsecnx.choices import Comparison
from sparsecnx.tensor import SparseTensor

MOST_CHANNELS = 2**16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x: SparseTensor) -> str | None:
    """Why the CUDA kernels cannot run on `x`; None where they can."""
    if x.dtype not in DTYPES:
        return f"CUDA kernels take float32, bfloat16 and float16, x is {x.dtype}"
    if not 1 <= x.features.shape[1] <= MOST_CHANNELS:
        return f"CUDA kernels take 1 to {MOST_CHANNELS} channels, x has {x.features.shape[1]}"
    if x.device.type == "cpu" and selected() != "cuda":
        return f"CUDA operators run on a GPU, x is on {x.device}"  # in the tests' emulator only when asked for by name
    return cuda.refusal(x.device)


def refusal_2d(x: SparseTensor) -> str | None:
    """As `refusal`, for kernels that are written for two spatial dimensions."""
    if x.layout.ndim != 2:
        return f"CUDA kernel is two-dimensional, x has {x.layout.ndim} spatial dimensions"
    return refusal(x)


def implementation(
    package: str,
    function: str,
    rule: Callable[[SparseTensor], str | None] = refusal,
    compare: Callable[..., Comparison] | None = None,
) -> Implementation:
    """`function` of the room `cuda.py` in an operator's `package`, imported only where the operators' schemas are
    loaded; `compare` says how its time compares with that of Triton, see `Implementation`."""
    if not compiled.loaded:
        return Implementation(_unavailable, rule, compare=compare)
    room = importlib.import_module(f"{package}.cuda")
    return Implementation(getattr(room, function), rule, compare=compare)


def _unavailable(*_: object) -> None:
    raise AssertionError("refused")  # `refusal` keeps every call away
