"""Convolution of the visible sites on the kernel map of its window, by a kernel that takes weights by group."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from sparsecnx.ops.convolution.window import Window
from sparsecnx.tensor import SparseTensor

Convolve = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def conv(
    convolve: Convolve, x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_out, C_in / groups, *kernel)`."""
    by_group = _by_group(weight, groups).permute(0, 3, 2, 1)  # (groups, K, C_in / groups, C_out / groups)
    return convolve(x.features, by_group, bias, x.layout.kernel_map(*window))


def conv_transpose(
    convolve: Convolve, x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`."""
    by_group = _by_group(weight, groups).permute(0, 3, 1, 2)
    return convolve(x.features, by_group, bias, x.layout.refine(window.stride).inverse_map(*window))


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """Return a weight `(A, B, *kernel)` as `(groups, A / groups, B, prod(kernel))`."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
