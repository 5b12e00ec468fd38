"""Checks and casts that the operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.tensor import SparseTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_sparse(x: object, name: str = "x") -> None:
    """Raises TypeError unless `x` is a `SparseTensor` of a floating dtype."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a SparseTensor")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} is {x.dtype}: expected one of {', '.join(map(str, FLOATING))}")


def check_vector(value: Tensor, name: str, channels: int, x: SparseTensor) -> None:
    """Raises unless `value` is a per-channel parameter with `channels` elements on the device of `x`."""
    if value.numel() != channels or value.shape[-1:] != (channels,):
        raise ValueError(f"{name} is {tuple(value.shape)}: expected ({channels},)")
    check_device(value, name, x)


def check_device(value: Tensor, name: str, x: SparseTensor) -> None:
    """Raises ValueError unless `value` lies on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}: x is on {x.device}")


def check_same_dtype(x: SparseTensor, name: str, value: Tensor) -> None:
    """Raises TypeError unless a weight has the dtype of the features it multiplies."""
    if value.dtype != x.dtype:
        raise TypeError(f"{name} is {value.dtype}: x is {x.dtype}, expected the same")


def autocast(x: SparseTensor, *weights: Tensor) -> tuple[SparseTensor, list[Tensor]]:
    """Features and weights in the autocast dtype of their device, unchanged where autocast is off.

    float64 is left alone, as `torch.autocast` does.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x, list(weights)
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), [weight.to(dtype) for weight in weights]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and per-channel parameters: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
