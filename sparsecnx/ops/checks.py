"""Checks and casts that the operators share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparsecnx.backends.dispatch import Rows
from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.tensor import SparseTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
X = TypeVar("X", SparseTensor, MappedRows)


def check_sparse(x: object, name: str = "x") -> None:
    """Raises TypeError unless `x` is a `SparseTensor` of a floating dtype."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a SparseTensor")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} is {x.dtype}: expected one of {', '.join(map(str, FLOATING))}")


def check_mapped(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> MappedRows:
    """The arguments that all operators on an explicit kernel map share, together.

    Raises:
        TypeError: one is no tensor, `features` not of a floating dtype or a map not int32.
        ValueError: a shape does not fit, or devices differ.
    """
    for value, name in ((features, "features"), (kernel_map, "kernel_map"), (inverse_map, "inverse_map")):
        if not isinstance(value, Tensor) and not (value is None and name == "inverse_map"):
            raise TypeError(f"{name} is a {type(value).__name__}: expected a tensor")
    if features.dtype not in FLOATING:
        raise TypeError(f"features is {features.dtype}: expected one of {', '.join(map(str, FLOATING))}")
    if features.ndim != 2:
        raise ValueError(f"features is {tuple(features.shape)}: expected (rows_in, C)")
    x = MappedRows(features, kernel_map, inverse_map)
    _check_map(kernel_map, "kernel_map", x)
    if inverse_map is not None:
        _check_map(inverse_map, "inverse_map", x)
        expected = (features.shape[0], kernel_map.shape[1])
        if tuple(inverse_map.shape) != expected:
            raise ValueError(f"inverse_map is {tuple(inverse_map.shape)}: expected (rows_in, K), here {expected}")
    return x


def _check_map(value: Tensor, name: str, x: MappedRows) -> None:
    if value.dtype != torch.int32:
        raise TypeError(f"{name} is {value.dtype}: expected torch.int32")
    if value.ndim != 2:
        raise ValueError(
            f"{name} is {tuple(value.shape)}: expected {'(rows_out, K)' if name == 'kernel_map' else '(rows_in, K)'}"
        )
    check_device(value, name, x)


def check_vector(value: Tensor, name: str, channels: int, x: Rows) -> None:
    """Raises unless `value` is a per-channel parameter with `channels` elements on the device of `x`."""
    if value.numel() != channels or value.shape[-1:] != (channels,):
        raise ValueError(f"{name} is {tuple(value.shape)}: expected ({channels},)")
    check_device(value, name, x)


def check_device(value: Tensor, name: str, x: Rows) -> None:
    """Raises ValueError unless `value` lies on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}: {_called(x)} is on {x.device}")


def check_same_dtype(x: Rows, name: str, value: Tensor) -> None:
    """Raises TypeError unless a weight has the dtype of the features it multiplies."""
    if value.dtype != x.dtype:
        raise TypeError(f"{name} is {value.dtype}: {_called(x)} is {x.dtype}, expected the same")


def _called(x: Rows) -> str:
    """The argument of a public function that `x` came from."""
    return "features" if isinstance(x, MappedRows) else "x"


def autocast(x: X, *weights: Tensor) -> tuple[X, list[Tensor]]:
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
