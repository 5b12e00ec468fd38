"""Pooling on tiles, dense: pool the images under their mask, keep the sites of visible tiles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.ops.convolution.window import Window
from sparsecnx.tensor import SparseTensor

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def max_pool(x: SparseTensor, window: Window, out: Layout) -> Tensor:
    """Return features `(rows_out, C)`: masked sites are -inf, so that they never win. A window without any is 0."""
    pool = MAX_POOL[x.layout.ndim]

    def pooled(value: SparseTensor) -> Tensor:
        padded = _padded(value.dense(-math.inf), window, out, -math.inf)
        return gather_rows(pool(padded, window.kernel, window.stride, 0, window.dilation), out)

    found = pooled(x)
    visible = pooled(x.with_features(x.features.detach().new_zeros(x.features.shape[0], 1)))
    return torch.where(visible == 0, found, 0)


def sum_pool(x: SparseTensor, window: Window, out: Layout, factor: float) -> Tensor:
    """Return the sums over the visible sites of each window times a number, `(rows_out, C)`."""
    padded = _padded(x.to(statistics_dtype(x.dtype)).dense(), window, out, 0.0)
    mean = AVG_POOL[x.layout.ndim](padded, window.kernel, window.stride)
    return gather_rows(mean * (math.prod(window.kernel) * factor), out).to(x.dtype)


def _padded(dense: Tensor, window: Window, out: Layout, value: float) -> Tensor:
    """Return images padded, or cut at their end, to the sites that the window of all output sites cover."""
    before_and_after = []
    for axis in reversed(range(out.ndim)):
        covered = (out.shape[axis] - 1) * window.stride[axis] + window.extent[axis]
        before = window.padding[axis]
        before_and_after += [before, covered - dense.shape[2 + axis] - before]
    return F.pad(dense, before_and_after, value=value)
