"""Convolution of the visible sites on a GPU, on the kernel map of its window."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.ops.convolution.maps import maps, transposed_maps
from sparsecnx.ops.convolution.window import Window
from sparsecnx.ops.mapped.triton_conv import convolve
from sparsecnx.tensor import SparseTensor


def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_out, C_in / groups, *kernel)`."""
    # (groups, K, C_in / groups, C_out / groups)
    by_group = weight.flatten(2).view(groups, -1, weight.shape[1], weight[0, 0].numel()).permute(0, 3, 2, 1)
    return convolve(x.features, by_group, bias, *maps(x.layout, window, x.features))


def conv_transpose(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (C_in, C_out / groups, *kernel)`."""
    by_group = weight.flatten(2).view(groups, -1, weight.shape[1], weight[0, 0].numel()).permute(0, 3, 1, 2)
    return convolve(x.features, by_group, bias, *transposed_maps(x.layout.refine(window.stride), window, x.features))
