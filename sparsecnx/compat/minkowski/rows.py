"""Rows taken by number, with gradients that are summed in float32, or not summed where none is taken twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Permuted.apply(grad, back, order), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(number)
        ctx.count = values.shape[0]
        return values[number]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (number,) = ctx.saved_tensors
        return totals(grad, number, ctx.count).to(grad.dtype), None


def permuted(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """`rows[order]`, where `order[back]` counts up: the gradient gathers, too."""
    found: Tensor = _Permuted.apply(rows, order, back)
    return found


def spread(values: Tensor, number: Tensor) -> Tensor:
    """`values[number]`, for values that many rows take: the gradient is summed in float32 at least."""
    found: Tensor = _Spread.apply(values, number)
    return found


def totals(rows: Tensor, number: Tensor, count: int) -> Tensor:
    """`(count, C)`: the sum of the rows of each number, in float32 at least."""
    rows = rows.to(statistics_dtype(rows.dtype))
    return rows.new_zeros(count, rows.shape[1]).index_add(0, number, rows)
