"""Batch, group and instance normalization by the compiled CPU kernel (`csrc/cpu/site_norm.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.global_response_norm.groups import group_splits
from sparsecnx.ops.site_normalization.activations import NUMBERS, PUBLIC
from sparsecnx.tensor import SparseTensor


def site_norm(
    x: SparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scope: str,
    groups: int,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features `(rows, C)`, and the mean and the biased variance `(segments, groups)`."""
    splits, number = group_splits(x.layout, scope), NUMBERS[activation]
    features = x.features.contiguous()
    return torch.ops.sparsecnx.site_norm(features, weight, bias, splits, groups, eps, number, slope)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads = torch.ops.sparsecnx.site_norm_backward(
        grad, saved.x, saved.weight, saved.bias, *saved.outputs, saved.splits, saved.groups, saved.eps,
        saved.activation, saved.slope, "x" in saved.needs,
    )  # fmt: skip
    return dict(zip(("x", "weight", "bias"), grads, strict=True))


def _fake(x: Tensor, weight, bias, splits, groups, eps, activation, slope):  # type: ignore[no-untyped-def]
    moments = x.new_empty(splits.shape[0] - 1, groups, dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x), moments, torch.empty_like(moments)


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, bias, mean, variance, splits, groups, eps, activation, slope, needs_x
):
    vector = x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]), vector, torch.empty_like(vector)


if compiled.loaded:
    register(
        "sparsecnx::site_norm",
        sizes={"x": "rows C", "weight": "C", "bias": "C"},
        public=PUBLIC,
        fake=_fake,
        saves=("x", "weight", "bias", "splits", "groups", "eps", "activation", "slope"),
        backward=_backward,
    )
    register("sparsecnx::site_norm_backward", public=PUBLIC, fake=_fake_backward)
