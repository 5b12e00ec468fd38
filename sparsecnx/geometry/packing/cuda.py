"""Gather and scatter by the compiled CUDA kernels (`csrc/cuda/packing.cu`)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled, triton_launch
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing.gradients import fill_grad
from sparsecnx.geometry.packing.rules import takes_triton

triton: Any = importlib.import_module("sparsecnx.geometry.packing.triton_kernels") if triton_launch.available else None


def gather_rows(dense: Tensor, layout: Layout) -> Tensor:
    """Rows `(layout.rows, C)` of a dense tensor `(B, C, H, W)`."""
    tiles = layout.tiles
    return torch.ops.sparsecnx_cuda.gather_tiles(dense, tiles.index, tiles.slots(), layout.tile)


def scatter_rows(rows: Tensor, layout: Layout, fill: Tensor) -> Tensor:
    """Dense tensor `(B, C, H, W)` of rows `(layout.rows, C)`, `fill (C,)` elsewhere."""
    tiles = layout.tiles
    return torch.ops.sparsecnx_cuda.scatter_tiles(
        rows.contiguous(), fill.contiguous(), tiles.index, tiles.slots(), layout.batch, *layout.shape, layout.tile
    )


if compiled.loaded:

    @torch.library.register_fake("sparsecnx_cuda::gather_tiles")
    def _(dense: Tensor, index: Tensor, slots: Tensor, tile: int) -> Tensor:
        return dense.new_empty(index.shape[0] * tile**2, dense.shape[1])

    @torch.library.register_fake("sparsecnx_cuda::scatter_tiles")
    def _(
        rows: Tensor, fill: Tensor, index: Tensor, slots: Tensor, batch: int, height: int, width: int, tile: int
    ) -> Tensor:
        return rows.new_empty(batch, rows.shape[1], height, width)

    def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, index, slots, ctx.tile = inputs
        ctx.save_for_backward(index, slots)
        ctx.shape = dense.shape

    def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        batch, channels, height, width = ctx.shape
        fill = grad.new_zeros(channels)
        grad_dense = torch.ops.sparsecnx_cuda.scatter_tiles(
            grad.contiguous(), fill, *ctx.saved_tensors, batch, height, width, ctx.tile
        )
        return grad_dense, None, None, None

    def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, index, slots, *_, ctx.tile = inputs
        ctx.save_for_backward(index, slots)

    def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, slots = ctx.saved_tensors
        grad_rows, grad_fill = None, None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.ops.sparsecnx_cuda.gather_tiles(grad, index, slots, ctx.tile)
        if ctx.needs_input_grad[1]:
            # A sum over sites, for which there is no CUDA kernel: torch's operators make copies of all of `grad`.
            if takes_triton(grad):
                grad_fill = triton.scatter_fill_grad(grad, slots, ctx.tile)
            else:
                grad_fill = fill_grad(grad, slots < 0, ctx.tile)
        return grad_rows, grad_fill, None, None, None, None, None, None

    torch.library.register_autograd("sparsecnx_cuda::gather_tiles", _gather_backward, setup_context=_gather_context)
    torch.library.register_autograd("sparsecnx_cuda::scatter_tiles", _scatter_backward, setup_context=_scatter_context)
