"""Checks and casts that the operators share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparsecnx.backends.dispatch import Rows
from sparsecnx.common.dtypes import FLOATING, statistics_dtype
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.tensor import SparseTensor, refuse_custom_function

X = TypeVar("X", SparseTensor, MappedRows)


def check_sparse(x: object, name: str = "x") -> None:
    """Raise TypeError unless `x` is a `SparseTensor` of a floating dtype."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a SparseTensor")
    if not torch.is_grad_enabled():
        refuse_custom_function((x,))
    _check_floating(x.dtype, name)
    check_memory(**{name: x.features})


def check_mapped(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> MappedRows:
    """Check the arguments that all operators on an explicit kernel map share, and return them together.

    Raises:
        TypeError: one is not a tensor, `features` is not of a floating dtype or a map not int32.
        ValueError: a shape does not fit, or devices differ.
    """
    for value, name in ((features, "features"), (kernel_map, "kernel_map"), (inverse_map, "inverse_map")):
        if not isinstance(value, Tensor) and not (value is None and name == "inverse_map"):
            raise TypeError(f"{name} is a {type(value).__name__}: expected a tensor")
    _check_floating(features.dtype, "features")
    check_memory(features=features)
    if features.ndim != 2:
        raise ValueError(f"features is {tuple(features.shape)}: expected (rows_in, C)")
    x = MappedRows(features, kernel_map, inverse_map)
    _check_map(kernel_map, "kernel_map", "rows_out", x)
    if inverse_map is not None:
        _check_map(inverse_map, "inverse_map", "rows_in", x)
        expected = (features.shape[0], kernel_map.shape[1])
        if tuple(inverse_map.shape) != expected:
            raise ValueError(f"inverse_map is {tuple(inverse_map.shape)}: expected (rows_in, K), here {expected}")
    return x


def _check_floating(dtype: torch.dtype, name: str) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name} is {dtype}: expected one of {', '.join(map(str, FLOATING))}")


def _check_map(value: Tensor, name: str, rows: str, x: MappedRows) -> None:
    if value.dtype != torch.int32:
        raise TypeError(f"{name} is {value.dtype}: expected torch.int32")
    if value.ndim != 2:
        raise ValueError(f"{name} is {tuple(value.shape)}: expected ({rows}, K)")
    check_device(value, name, x)


def check_vector(value: Tensor, name: str, channels: int, x: Rows) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of `channels` elements on the device of `x`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a tensor ({channels},)")
    shape = value.shape
    if shape != (channels,) and (shape[-1:] != (channels,) or value.numel() != channels):
        raise ValueError(f"{name} is {tuple(shape)}: expected ({channels},)")
    check_device(value, name, x)


def check_device(value: Tensor, name: str, x: Rows) -> None:
    """Raise ValueError unless `value` lies on the device of `x`, RuntimeError unless its storage holds it."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}: {_argument(x)} is on {x.device}; move one of them, .to(device)")
    check_memory(**{name: value})


def check_same_dtype(x: Rows, name: str, value: Tensor) -> None:
    """Raise TypeError unless a weight has the dtype of the features it multiplies."""
    if value.dtype != x.dtype:
        raise TypeError(f"{name} is {value.dtype}: {_argument(x)} is {x.dtype}, expected the same")


def _argument(x: Rows) -> str:
    """Return the name of the public argument that `x` came from."""
    return "features" if isinstance(x, MappedRows) else "x"


def autocast(x: X, *weights: Tensor) -> tuple[X, tuple[Tensor, ...]]:
    """Return features and weights in the autocast dtype of their device, unchanged where autocast is off.

    float64 is left alone, as `torch.autocast` does.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weights
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), tuple(weight.to(dtype) for weight in weights)


def checked_vector(value: Tensor, name: str, channels: int, x: Rows) -> Tensor:
    """Check a per-channel parameter, and return it contiguous in the dtype of the statistics of `x`.

    Its shape stays `(channels,)`, or what was published such as `(1, 1, 1, channels)`: kernels read its elements.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another number of elements, or is on another device than `x`.
    """
    check_vector(value, name, channels, x)
    return as_statistics(value, x)


def as_statistics(value: Tensor, x: Rows) -> Tensor:
    """Return a per-channel parameter contiguous in the dtype of the statistics of `x`."""
    dtype = statistics_dtype(x.dtype)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()
