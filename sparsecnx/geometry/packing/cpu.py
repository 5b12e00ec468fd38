"""Gather and scatter by the compiled CPU kernels (`csrc/cpu/packing.cpp`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register


def refusal(x: Any) -> str | None:
    """Return why the compiled kernels cannot move the values of a `Packing`; None where they can."""
    if x.device.type != "cpu":
        return f"compiled kernels run on the CPU, x is on {x.device}"
    return compiled.why_not


def gather_rows(x: Any) -> Tensor:
    """Return the rows `(layout.rows, C)` of the dense tensor `(B, C, *spatial)` of a `Packing`."""
    return torch.ops.sparsecnx.gather_tiles(x.features, x.layout.tiles.index, x.layout.tile)


def scatter_rows(x: Any, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, *spatial)` of the rows of a `Packing`, `fill (C,)` elsewhere."""
    layout = x.layout
    return torch.ops.sparsecnx.scatter_tiles(
        x.features.contiguous(), fill.contiguous(), layout.tiles.index, layout.batch, layout.shape, layout.tile
    )


def _gather_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    batch, channels, *shape = saved.shapes["dense"]
    fill = grad.new_zeros(channels)
    return {"dense": torch.ops.sparsecnx.scatter_tiles(grad, fill, saved.index, batch, shape, saved.tile)}


def _scatter_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    index, tile = saved.index, saved.tile
    grads: dict[str, Tensor | None] = {"rows": torch.ops.sparsecnx.gather_tiles(grad, index, tile)}
    if "fill" in saved.needs:
        batch, _, *shape = grad.shape
        grid = [size // side for size, side in zip(shape, tile, strict=True)]
        cells = torch.ones(batch * math.prod(grid), dtype=torch.bool, device=grad.device)
        masked = cells.index_fill(0, index, False).view(batch, 1, *grid)
        for axis, side in enumerate(tile):
            masked = masked.repeat_interleave(side, 2 + axis)
        # Masked sites alone are added: the sum of all less that of the visible ones would cancel.
        axes = (0, *range(2, grad.ndim))
        total = torch.where(masked, grad, 0).sum(axes, dtype=torch.promote_types(grad.dtype, torch.float32))
        grads["fill"] = total.to(grad.dtype)
    return grads


if compiled.loaded:
    register(
        "sparsecnx::gather_tiles",
        public="SparseTensor.from_dense",
        fake=lambda dense, index, tile: dense.new_empty(index.shape[0] * math.prod(tile), dense.shape[1]),
        saves=("index", "tile"),
        backward=_gather_backward,
    )
    register(
        "sparsecnx::scatter_tiles",
        sizes={"rows": "rows C", "fill": "C"},
        public="SparseTensor.dense",
        fake=lambda rows, fill, index, batch, shape, tile: rows.new_empty(batch, rows.shape[1], *shape),
        saves=("index", "tile"),
        backward=_scatter_backward,
        strided=True,
    )
