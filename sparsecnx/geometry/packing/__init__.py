"""Between dense tensors and the rows of their visible sites: gather and scatter, each the other's adjoint."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from sparsecnx.backends import compiled, triton_launch
from sparsecnx.backends.selection import selected
from sparsecnx.choices import compare
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import cpu, cuda, reference
from sparsecnx.geometry.packing.rules import takes_cuda, takes_triton

triton: Any = importlib.import_module("sparsecnx.geometry.packing.triton_kernels") if triton_launch.available else None


def gather_rows(dense: Tensor, layout: Layout) -> Tensor:
    """Rows `(layout.rows, C)` of a dense tensor `(B, C, *spatial)`. Masked sites are never read."""
    return _room(dense, layout).gather_rows(dense, layout)


def scatter_rows(rows: Tensor, layout: Layout, fill: Tensor) -> Tensor:
    """Dense tensor `(B, C, *spatial)` of rows `(layout.rows, C)`; inactive sites hold `fill (C,)`."""
    return _room(rows, layout).scatter_rows(rows, layout, fill)


def _room(values: Tensor, layout: Layout) -> Any:
    """The module that moves these values, of which the second axis are channels: compiled or Triton kernels where they
    can, else the reference. Moving rounds nothing, so of the backends that `use_backend` asks for by name only the
    reference is insisted on."""
    asked = selected()
    if asked == "reference" or layout.ndim != 2:
        return reference
    on_gpu = values.device.type != "cpu"
    triton_can = (on_gpu or asked == "triton") and takes_triton(values)
    cuda_can = (on_gpu or asked == "cuda") and takes_cuda(values)
    if cuda_can and (asked == "cuda" or not triton_can or (asked == "auto" and _cuda_is_faster(values, layout))):
        return cuda
    if triton_can:
        return triton
    return native if not on_gpu and compiled.loaded else reference


def _cuda_is_faster(values: Tensor, layout: Layout) -> bool:
    """Than Triton, both ways: each is the gradient of the other."""
    steps = ("gather_tiles", "scatter_tiles")
    return compare(steps, values.device, values.dtype, values.shape[1], layout.tile).backend == "cuda"
