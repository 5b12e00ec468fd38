"""Per-image scaling of rows by the compiled CPU kernel (`csrc/cpu/normalization.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.tensor import SparseTensor


def scale_images(x: SparseTensor, scale: Tensor) -> Tensor:
    """Return features `(rows, C)`, those of image `n` times `scale[n]`."""
    return torch.ops.sparsecnx.scale_rows(x.features.contiguous(), scale, x.layout.row_splits)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": torch.ops.sparsecnx.scale_rows(grad, saved.scale, saved.splits)}


if compiled.loaded:
    register(
        "sparsecnx::scale_rows",
        sizes={"x": "rows C"},
        public="stochastic_depth",
        fake=lambda x, scale, splits: torch.empty_like(x),
        saves=("scale", "splits"),
        backward=_backward,
    )
