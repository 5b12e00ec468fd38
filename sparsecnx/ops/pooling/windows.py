"""The windows of pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tables import cached_table
from sparsecnx.ops.convolution.window import Window, make_window, per_axis

Axes = int | tuple[int, ...]


def pooling_window(ndim: int, kernel: Axes, stride: Axes | None, padding: Axes, dilation: Axes = 1) -> Window:
    """Return the window of these numbers, one for every axis or one for all; without a stride, it is the kernel.

    Raises:
        ValueError: there are not as many as axes, one is too small, or the padding is more than half of the window.
    """
    sizes = per_axis(kernel, ndim, "kernel")
    if min(sizes) < 1:
        raise ValueError(f"kernel is {kernel}: expected 1 or more")
    window = make_window(sizes, sizes if stride is None else stride, padding, dilation)
    if any(2 * before > extent for before, extent in zip(window.padding, window.extent, strict=True)):
        raise ValueError(f"padding is {padding}: expected at most half of the kernel, {kernel}")
    return window


def divisors(layout: Layout, window: Window, out: Layout, count_include_pad: bool) -> float | Tensor:
    """Return what sums are divided by, as torch counts the sites of a window: a number, or `(rows_out, 1)`.

    Masked sites count. Padding counts with `count_include_pad`, beyond it nothing does.
    """
    axes = list(zip(layout.shape, out.shape, window.kernel, window.stride, window.padding, strict=True))
    ends = [(outputs - 1) * stride - before + kernel for _, outputs, kernel, stride, before in axes]
    pads = [before if count_include_pad else 0 for before in window.padding]
    if all(pad == axis[4] and end <= axis[0] + pad for axis, end, pad in zip(axes, ends, pads, strict=True)):
        return float(math.prod(window.kernel))

    def build() -> Tensor:
        total = torch.ones((), device=out.device)
        for (size, outputs, kernel, stride, before), pad in zip(axes, pads, strict=True):
            starts = [site * stride - before for site in range(outputs)]
            count = [min(start + kernel, size + pad) - max(start, -pad) for start in starts]
            total = total[..., None] * torch.tensor(count, dtype=torch.float32, device=out.device)
        return gather_rows(total.expand(out.batch, 1, *total.shape).contiguous(), out)

    return cached_table(out.tiles, ("divisors", layout.tile, window, count_include_pad), build)
