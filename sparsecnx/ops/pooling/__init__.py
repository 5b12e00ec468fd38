"""Pooling of the visible sites over window: their maximum, or their mean."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.geometry.layout import Layout
from sparsecnx.ops.checks import check_sparse
from sparsecnx.ops.convolution.maps import maps
from sparsecnx.ops.convolution.window import Window
from sparsecnx.ops.mapped import cpu, maximum
from sparsecnx.ops.pooling import reference
from sparsecnx.ops.pooling.windows import Axes, divisors, pooling_window
from sparsecnx.tensor import SparseTensor


def _rows(x: SparseTensor, window: Window) -> MappedRows:
    """Return the rows of `x` under a window."""
    return MappedRows(x.features, *maps(x.layout, window, x.features))


def _max(function: Callable[..., Tensor]) -> Callable[[SparseTensor, Window, Layout], Tensor]:
    """Return `max_pool` by a function of rows under a kernel map."""
    return lambda x, window, _: function(_rows(x, window))


def _sum(function: Callable[..., Tensor]) -> Callable[[SparseTensor, Window, Layout], Tensor]:
    """Return `sum_pool` by the depthwise convolution of rows under a kernel map, whose weight is 1."""

    def run(x: SparseTensor, window: Window, _: Layout) -> Tensor:
        rows = _rows(x.to(statistics_dtype(x.dtype)), window)
        return function(rows, rows.features.new_ones(math.prod(window.kernel), x.features.shape[1]), None)

    return run


max_operator = Operator(
    "max_pool",
    cpu=Implementation(_max(maximum.mapped_max_pool), cpu_backend.refusal),
    reference=Implementation(reference.max_pool),
)
sum_operator = Operator(
    "avg_pool",
    cpu=Implementation(_sum(cpu.mapped_depthwise_conv), cpu_backend.refusal),
    reference=Implementation(reference.sum_pool),
)


def max_pool(
    x: SparseTensor, kernel: Axes, stride: Axes | None = None, padding: Axes = 0, dilation: Axes = 1
) -> SparseTensor:
    """Return the maximum of the visible sites in each window, channel by channel.

        out[site] = max over k with a visible site of x[site * stride - padding + k * dilation]

    The result is that of dense max pooling to `H / stride` sites where masked sites are -inf, at the sites of visible
    tiles. A NaN wins, as in torch. A window without any visible site gives 0.

    Args:
        x: features `(rows, C)`, tile side T.
        kernel: sites of a window, one number or one for each axis, as all of these.
        stride: sites between window, by default `kernel`; divides T.
        padding: sites of the first window before the border, at most half of the kernel.
        dilation: sites between the sites of a window.

    Returns:
        The layout of `x` coarsened by `stride`, features `(rows / prod(stride), C)` in the dtype of `x`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `kernel`, `stride`, `padding` or `dilation` does not fit.
    """
    check_sparse(x)
    window = pooling_window(x.layout.ndim, kernel, stride, padding, dilation)
    out = x.layout.coarsen(window.stride)
    return x.with_features(max_operator(x, window, out), out)


def avg_pool(
    x: SparseTensor,
    kernel: Axes,
    stride: Axes | None = None,
    padding: Axes = 0,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SparseTensor:
    """Return the mean of each window, channel by channel. Masked sites count as zeros, as padding does.

    The result is that of zeroing the masked sites of a dense tensor, average pooling to `H / stride` sites, and keeping
    the sites of visible tiles.

    Args:
        x, kernel, stride, padding: as in `max_pool`.
        count_include_pad: whether sites of the padding count in the mean.
        divisor_override: what sums are divided by, instead of the sites that count.

    Returns:
        The layout of `x` coarsened by `stride`, features `(rows / prod(stride), C)` in the dtype of `x`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `kernel`, `stride` or `padding` does not fit, or `divisor_override` is 0.
    """
    check_sparse(x)
    window = pooling_window(x.layout.ndim, kernel, stride, padding)
    if divisor_override == 0:
        raise ValueError("divisor_override is 0: expected another number, or None")
    out = x.layout.coarsen(window.stride)
    divisor: float | Tensor
    if divisor_override is None:
        divisor = divisors(x.layout, window, out, count_include_pad)
    else:
        divisor = float(divisor_override)
    return x.with_features((sum_operator(x, window, out) / divisor).to(x.dtype), out)
