"""Between dense tensors and the rows of their visible sites: gather and scatter, each the other's adjoint."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sparsecnx import _extension, _triton
from sparsecnx.layout import Layout
from sparsecnx.packing import native, reference
from sparsecnx.selection import selected

triton: Any = importlib.import_module("sparsecnx.packing.triton") if _triton.available else None

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_rows(dense: Tensor, layout: Layout) -> Tensor:
    """Rows `(layout.rows, C)` of a dense tensor `(B, C, *spatial)`. Masked sites are never read."""
    return _room(dense, layout).gather_rows(dense, layout)


def scatter_rows(rows: Tensor, layout: Layout, fill: Tensor) -> Tensor:
    """Dense tensor `(B, C, *spatial)` of rows `(layout.rows, C)`; inactive sites hold `fill (C,)`."""
    return _room(rows, layout).scatter_rows(rows, layout, fill)


def _room(values: Tensor, layout: Layout) -> Any:
    """The module that moves these values: compiled or Triton kernels where they can, else the reference. Moving rounds
    nothing, so of the backends that `use_backend` asks for by name only the reference is insisted on."""
    if selected() == "reference" or layout.ndim != 2:
        return reference
    on_cpu = values.device.type == "cpu"
    takes_triton = _triton.available and values.dtype in TRITON_DTYPES and (not on_cpu or selected() == "triton")
    if takes_triton and _triton.refusal(values.device) is None:
        return triton
    return native if on_cpu and _extension.loaded else reference
