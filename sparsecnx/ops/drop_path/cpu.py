"""Per-image scaling of rows by the compiled CPU kernel (`csrc/cpu/scale_rows.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.tensor import SparseTensor


def scale_images(x: SparseTensor, scale: Tensor) -> Tensor:
    """Features `(rows, C)`, those of image `n` times `scale[n]`."""
    return torch.ops.sparsecnx.scale_rows(x.features.contiguous(), scale, x.layout.row_splits)


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::scale_rows")
    def _(x: Tensor, scale: Tensor, splits: Tensor) -> Tensor:
        return torch.empty_like(x)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, scale, splits = inputs
        ctx.save_for_backward(scale, splits)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scale, splits = ctx.saved_tensors
        return torch.ops.sparsecnx.scale_rows(grad.contiguous(), scale, splits), None, None

    torch.library.register_autograd("sparsecnx::scale_rows", _backward, setup_context=_setup_context)
