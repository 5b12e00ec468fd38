"""Pooling of the visible sites over windows: their maximum, or their mean."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import check_sparse
from sparsecnx.ops.pooling import reference
from sparsecnx.ops.pooling.windows import Windows, divisors
from sparsecnx.tensor import SparseTensor

max_operator = Operator("max_pool", reference=Implementation(reference.max_pool))
sum_operator = Operator("avg_pool", reference=Implementation(reference.sum_pool))

Axes = int | tuple[int, ...]


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
        stride: sites between windows, by default `kernel`; divides T.
        padding: sites of the first window before the border, at most half of the kernel.
        dilation: sites between the sites of a window.

    Returns:
        The layout of `x` coarsened by `stride`, features `(rows / prod(stride), C)` in the dtype of `x`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `kernel`, `stride`, `padding` or `dilation` does not fit.
    """
    check_sparse(x)
    windows = Windows.of(x.layout.ndim, kernel, kernel if stride is None else stride, padding, dilation)
    out = windows.coarsened(x.layout)
    return x.with_features(max_operator(x, windows, out), out)


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
    windows = Windows.of(x.layout.ndim, kernel, kernel if stride is None else stride, padding)
    if divisor_override == 0:
        raise ValueError("divisor_override is 0: expected another number, or None")
    out = windows.coarsened(x.layout)
    divisor: float | Tensor
    if divisor_override is None:
        divisor = divisors(x.layout, windows, out, count_include_pad)
    else:
        divisor = float(divisor_override)
    return x.with_features((sum_operator(x, windows, out) / divisor).to(x.dtype), out)
