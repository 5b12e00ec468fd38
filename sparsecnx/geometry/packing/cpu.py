"""Gather and scatter by the compiled CPU kernels (`csrc/cpu/packing.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing.gradients import fill_grad


def gather_rows(dense: Tensor, layout: Layout) -> Tensor:
    """Rows `(layout.rows, C)` of a dense tensor `(B, C, H, W)`."""
    return torch.ops.sparsecnx.gather_tiles(dense, layout.tiles.index, layout.tile)


def scatter_rows(rows: Tensor, layout: Layout, fill: Tensor) -> Tensor:
    """Dense tensor `(B, C, H, W)` of rows `(layout.rows, C)`, `fill (C,)` elsewhere."""
    return torch.ops.sparsecnx.scatter_tiles(
        rows.contiguous(), fill.contiguous(), layout.tiles.index, layout.batch, *layout.shape, layout.tile
    )


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::gather_tiles")
    def _(dense: Tensor, index: Tensor, tile: int) -> Tensor:
        return dense.new_empty(index.shape[0] * tile**2, dense.shape[1])

    @torch.library.register_fake("sparsecnx::scatter_tiles")
    def _(rows: Tensor, fill: Tensor, index: Tensor, batch: int, height: int, width: int, tile: int) -> Tensor:
        return rows.new_empty(batch, rows.shape[1], height, width)

    def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, index, ctx.tile = inputs
        ctx.save_for_backward(index)
        ctx.shape = dense.shape

    def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        grad_dense = torch.ops.sparsecnx.scatter_tiles(
            grad.contiguous(), grad.new_zeros(channels), index, batch, height, width, ctx.tile
        )
        return grad_dense, None, None

    def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.tile = inputs[-1]

    def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad_rows = torch.ops.sparsecnx.gather_tiles(grad, index, ctx.tile)
        grad_fill = None
        if ctx.needs_input_grad[1]:
            batch, _, height, width = grad.shape
            cells = batch * (height // ctx.tile) * (width // ctx.tile)
            masked = torch.ones(cells, dtype=torch.bool, device=grad.device).index_fill(0, index, False)
            grad_fill = fill_grad(grad, masked, ctx.tile)
        return grad_rows, grad_fill, None, None, None, None, None

    torch.library.register_autograd("sparsecnx::gather_tiles", _gather_backward, setup_context=_gather_context)
    torch.library.register_autograd("sparsecnx::scatter_tiles", _scatter_backward, setup_context=_scatter_context)
