"""The maximum and the sum of the rows under a kernel map by the compiled CPU kernels (`csrc/cpu/pooling.cpp`).

The gradient of a maximum keeps one number for each output value: that of the tap that won.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.kernel_map import MappedRows, invert_kernel_map
from sparsecnx.geometry.tile_maps import inverted, rows_out, taps
from sparsecnx.geometry.window_rows import WindowRows

MOST_SHORT_TAPS = 255  # whose numbers are kept in 8 bits, as in csrc/cpu/kernels.h


def mapped_max_pool(x: MappedRows | WindowRows) -> Tensor:
    """Return the maximum of the rows under each output row, `(rows_out, C)`, 0 without any input."""
    kernel_map, *window = x.compiled_map
    out, _ = torch.ops.sparsecnx.max_pool(x.features.contiguous(), kernel_map, _inverse_map(x), *window)
    return out


def mapped_sum_pool(x: MappedRows | WindowRows, factor: float) -> Tensor:
    """Return the sum of the rows under each output row times a number, `(rows_out, C)`."""
    kernel_map, *window = x.compiled_map
    return torch.ops.sparsecnx.sum_pool(x.features.contiguous(), kernel_map, _inverse_map(x), factor, *window)


def _inverse_map(x: MappedRows | WindowRows) -> Tensor | None:
    """Return the inverse map that was given."""
    return x.inverse_map.contiguous() if isinstance(x, MappedRows) and x.inverse_map is not None else None


def winner_dtype(taps: int) -> torch.dtype:
    """Return the dtype of the numbers of taps that gradients of a maximum keep."""
    return torch.uint8 if taps <= MOST_SHORT_TAPS else torch.int32


def _max_pool_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    (winner,), kernel_map, inverse_map, window = saved.outputs, saved.kernel_map, saved.inverse_map, saved.window
    if inverse_map is None and not window:
        inverse_map = invert_kernel_map(kernel_map, saved.shapes["x"][0])
    return {"x": torch.ops.sparsecnx.max_pool_backward(grad, winner, kernel_map, inverse_map, saved.grid, window)}


def _sum_pool_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    kernel_map, inverse_map, factor = saved.kernel_map, saved.inverse_map, saved.factor
    if saved.window:
        return {"x": torch.ops.sparsecnx.sum_pool(grad, kernel_map, None, factor, saved.grid, inverted(saved.window))}
    if inverse_map is None:
        inverse_map = invert_kernel_map(kernel_map, saved.shapes["x"][0])
    check_memory(kernel_map=kernel_map, inverse_map=inverse_map)  # by these names: the operator exchanges them
    return {"x": torch.ops.sparsecnx.sum_pool(grad, inverse_map, kernel_map, factor, [], [])}


if compiled.loaded:
    register(
        "sparsecnx::sum_pool",
        public="avg_pool",
        sizes={"x": "rows C", "inverse_map": "rows K"},
        fake=lambda x, kernel_map, inverse_map, factor, grid, window: x.new_empty(
            rows_out(kernel_map, window), x.shape[1]
        ),
        saves=("kernel_map", "inverse_map", "factor", "grid", "window"),
        backward=_sum_pool_backward,
    )
    register(
        "sparsecnx::max_pool",
        sizes={"x": "rows C", "inverse_map": "rows K"},
        fake=lambda x, kernel_map, inverse_map, grid, window: (
            x.new_empty(rows_out(kernel_map, window), x.shape[1]),
            x.new_empty(rows_out(kernel_map, window), x.shape[1], dtype=winner_dtype(taps(kernel_map, window))),
        ),
        saves=("kernel_map", "inverse_map", "grid", "window"),
        backward=_max_pool_backward,
    )
    register(
        "sparsecnx::max_pool_backward",
        public="max_pool",
        fake=lambda grad, winner, kernel_map, inverse_map, grid, window: grad.new_empty(
            rows_out(kernel_map, inverted(window)) if window else inverse_map.shape[0], grad.shape[1]
        ),
    )
