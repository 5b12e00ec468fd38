"""Layer normalization by the compiled CPU kernel (`csrc/cpu/normalization.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.tensor import SparseTensor


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return features `(rows, C)`."""
    out, _ = torch.ops.sparsecnx.layer_norm(x.features.contiguous(), weight, bias, eps)
    return out


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    (moments,) = saved.outputs
    grads = torch.ops.sparsecnx.layer_norm_backward(grad, saved.x, saved.weight, moments)
    return dict(zip(("x", "weight", "bias"), grads, strict=True))


if compiled.loaded:
    register(
        "sparsecnx::layer_norm",
        sizes={"x": "rows C", "weight": "C", "bias": "C"},
        fake=lambda x, weight, bias, eps: (torch.empty_like(x), weight.new_empty(x.shape[0], 2)),
        saves=("x", "weight"),
        backward=_backward,
    )
    register(
        "sparsecnx::layer_norm_backward",
        public="layer_norm",
        fake=lambda grad, x, weight, moments: (
            torch.empty_like(x),
            torch.empty_like(weight),
            torch.empty_like(weight),
        ),
    )
