"""The maximum of the rows under a kernel map in plain torch, tap by tap: nothing of size rows x K x C is made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.geometry.kernel_map import turned


@torch.library.custom_op("sparsecnx_mapped::max_pool", mutates_args=())
def maximum(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maximum `(rows_out, C)`, 0 without any input, and the first tap that has it, int32, -1 without any."""
    padded = F.pad(features, (0, 0, 0, 1))
    best = features.new_zeros(kernel_map.shape[0], features.shape[1])
    winner = torch.full_like(best, -1, dtype=torch.int32)
    for tap, rows in enumerate(kernel_map.unbind(1)):
        value = padded.index_select(0, torch.where(rows == -1, features.shape[0], rows))
        # A NaN wins, as in torch's own pooling.
        better = (rows >= 0)[:, None] & ((winner < 0) | (value > best) | value.isnan())
        best = torch.where(better, value, best)
        winner = torch.where(better, tap, winner)
    return best, winner


@torch.library.custom_op("sparsecnx_mapped::max_pool_backward", mutates_args=())
def _maximum_backward(grad: Tensor, winner: Tensor, inverse_map: Tensor) -> Tensor:
    """Every input row gathers the gradients of the output rows that took it: no atomics."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    padded, taken = F.pad(grad.to(wide), (0, 0, 0, 1)), F.pad(winner, (0, 0, 0, 1), value=-1)
    total = padded.new_zeros(inverse_map.shape[0], grad.shape[1])
    for tap, rows in enumerate(inverse_map.unbind(1)):
        rows = torch.where(rows == -1, grad.shape[0], rows)
        total += torch.where(taken.index_select(0, rows) == tap, padded.index_select(0, rows), 0)
    return total.to(grad.dtype)


@maximum.register_fake
def _(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    best = features.new_empty(kernel_map.shape[0], features.shape[1])
    return best, torch.empty_like(best, dtype=torch.int32)


@_maximum_backward.register_fake
def _(grad: Tensor, winner: Tensor, inverse_map: Tensor) -> Tensor:
    return grad.new_empty(inverse_map.shape[0], grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, kernel_map, inverse_map = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.rows = features.shape[0]
    ctx.save_for_backward(kernel_map, inverse_map, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    kernel_map, inverse_map, winner = ctx.saved_tensors
    if inverse_map is None:
        inverse_map = turned(kernel_map, ctx.rows)
    return _maximum_backward(grad, winner, inverse_map), None, None


maximum.register_autograd(_backward, setup_context=_setup_context)
