"""The maximum of the rows under a kernel map in plain torch, tap by tap: nothing of size rows x K x C is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.selection import selected
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.kernel_map import check_inverse_map, check_kernel_map, invert_kernel_map
from sparsecnx.ops.checks import check_mapped


def maximum(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> Tensor:
    """Return the maximum of `features (rows_in, C)` under each output row, `(rows_out, C)`, 0 without any input."""
    if selected() == "reference":  # Plain torch has every derivative, and keeps every tap for it.
        return _max_pool(features, kernel_map.contiguous(), None)[0]
    inverse_map = None if inverse_map is None else inverse_map.contiguous()
    return torch.ops.sparsecnx_mapped.max_pool(features, kernel_map.contiguous(), inverse_map)[0]


def _max_pool(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the maximum `(rows_out, C)`, and the first tap that has it, int32, -1 without any input."""
    check_mapped(features, kernel_map, inverse_map)
    _check_contiguous(kernel_map=kernel_map, inverse_map=inverse_map)
    check_kernel_map(kernel_map, features.shape[0])
    padded = F.pad(features, (0, 0, 0, 1))
    best = features.new_zeros(kernel_map.shape[0], features.shape[1])
    winner = torch.full_like(best, -1, dtype=torch.int32)
    if best.numel() == 0:
        return best + features[:0].sum(), winner  # however many taps there are, and with a gradient
    for tap, rows in enumerate(kernel_map.unbind(1)):
        value = padded.index_select(0, torch.where(rows == -1, features.shape[0], rows))
        # A NaN wins, as in torch's own pooling.
        better = (rows >= 0)[:, None] & ((winner < 0) | (value > best) | value.isnan())
        best = torch.where(better, value, best)
        winner = torch.where(better, tap, winner)
    return best, winner


def _max_pool_backward(
    grad: Tensor, winner: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, rows_in: int
) -> Tensor:
    """Gather for every input row the gradients of the output rows that took it: no atomics."""
    check_memory(grad=grad, winner=winner)
    check_mapped(grad, kernel_map, None)
    _check_contiguous(kernel_map=kernel_map, inverse_map=inverse_map)
    for name, given, expected in (
        ("kernel_map", kernel_map, (grad.shape[0], kernel_map.shape[1])),
        ("winner", winner, tuple(grad.shape)),
        ("inverse_map", inverse_map, (rows_in, kernel_map.shape[1])),
    ):
        if given is not None and (tuple(given.shape) != expected or given.dtype != torch.int32):
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}: expected torch.int32 {expected}")
    if inverse_map is None:
        check_kernel_map(kernel_map, rows_in)
        inverse_map = invert_kernel_map(kernel_map, rows_in)
    else:
        check_inverse_map(kernel_map, inverse_map)
    if grad.numel() == 0:
        return grad.new_zeros(rows_in, grad.shape[1])
    wide = torch.promote_types(grad.dtype, torch.float32)
    padded, taken = F.pad(grad.to(wide), (0, 0, 0, 1)), F.pad(winner, (0, 0, 0, 1), value=-1)
    total = padded.new_zeros(inverse_map.shape[0], grad.shape[1])
    for tap, rows in enumerate(inverse_map.unbind(1)):
        rows = torch.where(rows == -1, grad.shape[0], rows)
        total += torch.where(taken.index_select(0, rows) == tap, padded.index_select(0, rows), 0)
    return total.to(grad.dtype)


def _check_contiguous(**maps: Tensor | None) -> None:
    """Raise ValueError for a map of other strides: one that is expanded can have more entries than there is memory."""
    for name, value in maps.items():
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous tensor")


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    (winner,), rows_in = saved.outputs, saved.shapes["features"][0]
    backward = torch.ops.sparsecnx_mapped.max_pool_backward
    return {"features": backward(grad, winner, saved.kernel_map, saved.inverse_map, rows_in)}


def _fake(features: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    best = features.new_empty(kernel_map.shape[0], features.shape[1])
    return best, torch.empty_like(best, dtype=torch.int32)


register(
    "sparsecnx_mapped::max_pool",
    sizes={"features": "rows C", "kernel_map": "rows_out K"},
    public="mapped_pool",
    function=_max_pool,
    fake=_fake,
    saves=("kernel_map", "inverse_map"),
    backward=_backward,
)
register(
    "sparsecnx_mapped::max_pool_backward",
    public="mapped_pool",
    function=_max_pool_backward,
    fake=lambda grad, winner, kernel_map, inverse_map, rows_in: grad.new_empty(rows_in, grad.shape[1]),
)
