"""Between dense tensors and the rows of their visible sites: gather and scatter, each the other's adjoint."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import cpu, reference


class Packing(NamedTuple):
    """The input of both operators: values `(B, C, *spatial)` or `(rows, C)`, and the layout of the rows."""

    features: Tensor
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device


def _triton_refusal(x: Packing) -> str | None:
    if x.layout.ndim > 3:
        return f"Triton kernel goes along up to three axes, x has {x.layout.ndim} spatial dimensions"
    return triton_launch.refusal(x)


def _operator(name: str, function: str) -> Operator:
    return Operator(
        name,
        strict=False,  # Moving values rounds nothing.
        cpu=Implementation(getattr(cpu, function), cpu.refusal),
        triton=triton_launch.implementation("sparsecnx.geometry.packing.triton_kernels", function, _triton_refusal),
        reference=Implementation(getattr(reference, function)),
    )


gather_operator = _operator("gather_rows", "gather_rows")
scatter_operator = _operator("scatter_rows", "scatter_rows")


def gather_rows(dense: Tensor, layout: Layout) -> Tensor:
    """Return the rows `(layout.rows, C)` of a dense tensor `(B, C, *spatial)`. Masked sites are never read."""
    rows: Tensor = gather_operator(Packing(dense, layout))
    return rows


def scatter_rows(rows: Tensor, layout: Layout, fill: Tensor) -> Tensor:
    """Return the dense tensor `(B, C, *spatial)` of rows `(layout.rows, C)`; inactive sites hold `fill (C,)`."""
    dense: Tensor = scatter_operator(Packing(rows, layout), fill)
    return dense
