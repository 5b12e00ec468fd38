"""Convolution of the visible sites on the kernel map of its window, by a kernel that takes weights by group."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops.convolution.window import Window
from sparsecnx.tensor import SparseTensor

Convolve = Callable[[WindowRows, Tensor, Tensor | None], Tensor]


def conv(
    convolve: Convolve, x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_out, C_in / groups, *kernel)`."""
    by_group = _by_group(weight, groups).permute(0, 3, 2, 1)  # (groups, K, C_in / groups, C_out / groups)
    return convolve(WindowRows(x.features, x.layout, window), by_group, bias)


def conv_transpose(
    convolve: Convolve, x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`."""
    by_group = _by_group(weight, groups).permute(0, 3, 1, 2)
    return convolve(WindowRows(x.features, x.layout.refine(window.stride), window, transposed=True), by_group, bias)


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """Return a weight `(A, B, *kernel)` as `(groups, A / groups, B, prod(kernel))`."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
