"""Gather and scatter by the compiled CPU kernels (`csrc/cpu/packing.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register


def refusal(x: Any) -> str | None:
    """Return why the compiled kernels cannot move the values of a `Packing`; None where they can."""
    if x.layout.ndim != 2:
        return f"compiled kernel is two-dimensional, x has {x.layout.ndim} spatial dimensions"
    if x.layout.side is None:
        return f"compiled kernel takes square tiles, x has tiles of {x.layout.tile} sites"
    if x.device.type != "cpu":
        return f"compiled kernels run on the CPU, x is on {x.device}"
    return compiled.why_not


def gather_rows(x: Any) -> Tensor:
    """Return the rows `(layout.rows, C)` of the dense tensor `(B, C, H, W)` of a `Packing`."""
    return torch.ops.sparsecnx.gather_tiles(x.features, x.layout.tiles.index, x.layout.side)


def scatter_rows(x: Any, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, H, W)` of the rows of a `Packing`, `fill (C,)` elsewhere."""
    layout = x.layout
    return torch.ops.sparsecnx.scatter_tiles(
        x.features.contiguous(), fill.contiguous(), layout.tiles.index, layout.batch, *layout.shape, layout.side
    )


def _gather_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    batch, channels, height, width = saved.shapes["dense"]
    fill = grad.new_zeros(channels)
    return {"dense": torch.ops.sparsecnx.scatter_tiles(grad, fill, saved.index, batch, height, width, saved.tile)}


def _scatter_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    index, tile = saved.index, saved.tile
    grads: dict[str, Tensor | None] = {"rows": torch.ops.sparsecnx.gather_tiles(grad, index, tile)}
    if "fill" in saved.needs:
        batch, _, height, width = grad.shape
        cells = torch.ones(batch * (height // tile) * (width // tile), dtype=torch.bool, device=grad.device)
        masked = cells.index_fill(0, index, False).view(batch, 1, height // tile, width // tile)
        masked = masked.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        # Masked sites alone are added: the sum of all less that of the visible ones would cancel.
        total = torch.where(masked, grad, 0).sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
        grads["fill"] = total.to(grad.dtype)
    return grads


if compiled.loaded:
    register(
        "sparsecnx::gather_tiles",
        public="SparseTensor.from_dense",
        fake=lambda dense, index, tile: dense.new_empty(index.shape[0] * tile**2, dense.shape[1]),
        saves=("index", "tile"),
        backward=_gather_backward,
    )
    register(
        "sparsecnx::scatter_tiles",
        sizes={"rows": "rows C", "fill": "C"},
        public="SparseTensor.dense",
        fake=lambda rows, fill, index, batch, height, width, tile: rows.new_empty(batch, rows.shape[1], height, width),
        saves=("index", "tile"),
        backward=_scatter_backward,
        strided=True,
    )
