"""Gathers and sums of rows by number, with gradients that lose no precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Permute.apply(grad, back, order), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(number)
        ctx.count = values.shape[0]
        return values[number]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (number,) = ctx.saved_tensors
        return sum_by_number(grad, number, ctx.count).to(grad.dtype), None


def permute(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return `rows[order]`. `back` is the inverse of `order`, so that the gradient is a gather, too."""
    permuted: Tensor = _Permute.apply(rows, order, back)
    return permuted


def spread(values: Tensor, number: Tensor) -> Tensor:
    """Return `values[number]`; the gradient is summed in float32 at least."""
    found: Tensor = _Spread.apply(values, number)
    return found


def sum_by_number(rows: Tensor, number: Tensor, count: int) -> Tensor:
    """Return `(count, C)`: the sum of the rows with each number, in float32 at least."""
    rows = rows.to(statistics_dtype(rows.dtype))
    return rows.new_zeros(count, rows.shape[1]).index_add(0, number, rows)
