"""Global Response Normalization by the compiled CPU kernel (`csrc/cpu/normalization.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.ops.global_response_norm.groups import group_splits
from sparsecnx.tensor import SparseTensor


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str, eps: float) -> Tensor:
    """Return features `(rows, C)`; `gamma`, `beta` of C elements."""
    out, _ = torch.ops.sparsecnx.grn(x.features.contiguous(), gamma, beta, group_splits(x.layout, scope), eps)
    return out


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    (energy,) = saved.outputs
    grads = torch.ops.sparsecnx.grn_backward(grad, saved.x, saved.gamma, saved.splits, energy, saved.eps)
    return dict(zip(("x", "gamma", "beta"), grads, strict=True))


if compiled.loaded:
    register(
        "sparsecnx::grn",
        sizes={"x": "rows C", "gamma": "C", "beta": "C"},
        fake=lambda x, gamma, beta, splits, eps: (
            torch.empty_like(x),
            gamma.new_empty(splits.shape[0] - 1, x.shape[1]),
        ),
        saves=("x", "gamma", "splits", "eps"),
        backward=_backward,
    )
    register(
        "sparsecnx::grn_backward",
        public="grn",
        fake=lambda grad, x, gamma, splits, energy, eps: (
            torch.empty_like(x),
            torch.empty_like(gamma),
            torch.empty_like(gamma),
        ),
    )
