"""Pooling of the visible sites over window: their maximum, or their mean."""

from __future__ import annotations

import math

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.nested_order import children_are_consecutive
from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops.checks import check_sparse
from sparsecnx.ops.convolution.window import Window
from sparsecnx.ops.mapped import cpu_pooling
from sparsecnx.ops.pooling import reference
from sparsecnx.ops.pooling.windows import Axes, divisors, pooling_window
from sparsecnx.tensor import SparseTensor, packed


def _by_map(implementation: Implementation) -> Implementation:
    """Return the implementation of a function of rows under a kernel map for a SparseTensor, a window and a layout."""

    def run(x: SparseTensor, window: Window, _: Layout, *rest: float) -> Tensor:
        features: Tensor = implementation.function(WindowRows(x.features, x.layout, window), *rest)
        return features

    return Implementation(run, implementation.refusal)


max_operator = Operator(
    "max_pool",
    cpu=_by_map(Implementation(cpu_pooling.mapped_max_pool, cpu_backend.refusal)),
    triton=_by_map(triton_launch.implementation("sparsecnx.ops.mapped.triton_pooling", "mapped_max_pool")),
    reference=Implementation(reference.max_pool),
)
sum_operator = Operator(
    "avg_pool",
    cpu=_by_map(Implementation(cpu_pooling.mapped_sum_pool, cpu_backend.refusal)),
    triton=_by_map(triton_launch.implementation("sparsecnx.ops.mapped.triton_pooling", "mapped_sum_pool")),
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
    return packed(max_operator(x, window, out), out)


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
    out = x.layout.coarsen(window.stride)
    return packed(means(x, window, out, count_include_pad, divisor_override), out)


def means(
    x: SparseTensor, window: Window, out: Layout, count_include_pad: bool, divisor_override: int | None
) -> Tensor:
    """Return the features of `avg_pool`, whose other arguments were checked."""
    if divisor_override == 0:
        raise ValueError("divisor_override is 0: expected another number, or None")
    counted = (
        divisors(x.layout, window, out, count_include_pad) if divisor_override is None else float(divisor_override)
    )
    if isinstance(counted, Tensor):
        total = sum_operator(x.to(statistics_dtype(x.dtype)), window, out, 1.0)
        return (total / counted).to(x.dtype)
    if window.partitions and children_are_consecutive(x.layout.tile, window.stride):
        taps = math.prod(window.kernel)
        mean = x.features.reshape(out.rows, taps, x.features.shape[1]).mean(1)
        return mean if counted == taps else mean * (taps / counted)
    features: Tensor = sum_operator(x, window, out, 1.0 / counted)
    return features
