"""The windows of pooling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tables import cached_table


@dataclass(frozen=True)
class Windows:
    """Output site `o` reads the sites `o * stride - padding + k * dilation`, `k` below `kernel`, on each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, kernel: object, stride: object, padding: object, dilation: object = 1) -> Windows:
        """Check the arguments of a pooling function, each an integer or one for each axis.

        Raises:
            TypeError: one is neither.
            ValueError: one has another number of axes, or is too small; or the padding exceeds half of the kernel.
        """
        given = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        values = {}
        for name, value in given.items():
            whole = (value,) * ndim if isinstance(value, int) else value
            if not isinstance(whole, (tuple, list)) or not all(isinstance(one, int) for one in whole):
                raise TypeError(f"{name} is {value!r}: expected an integer, or one for each axis")
            least = 0 if name == "padding" else 1
            if len(whole) != ndim or min(whole) < least:
                raise ValueError(f"{name} is {value!r}: expected {ndim} integers of {least} or more, or one for all")
            values[name] = tuple(whole)
        windows = cls(**values)
        if any(
            2 * p > (k - 1) * d + 1 for p, k, d in zip(windows.padding, windows.kernel, windows.dilation, strict=True)
        ):
            raise ValueError(f"padding is {padding!r}: expected at most half of the kernel, {kernel!r}")
        return windows

    def reach(self, axis: int) -> int:
        """Return the sites from the first to the last of a window."""
        return (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def coarsened(self, layout: Layout) -> Layout:
        """Return the layout of the output sites."""
        return layout.coarsen(self.stride)

    def are_children(self, layout: Layout) -> bool:
        """Return whether every window is the consecutive rows of one output site, in the order of the window."""
        plain = self.kernel == self.stride and not any(self.padding) and max(self.dilation) == 1
        return plain and set(self.stride) <= {2}


def divisors(layout: Layout, windows: Windows, out: Layout, count_include_pad: bool) -> float | Tensor:
    """Return what sums are divided by, as torch counts the sites of a window: a number, or `(rows_out, 1)`.

    Masked sites count. Padding counts with `count_include_pad`, beyond it nothing does.
    """
    counts = []
    for axis, size in enumerate(layout.shape):
        before = windows.padding[axis]
        after = before if count_include_pad else 0
        first = -before if count_include_pad else 0
        starts = [site * windows.stride[axis] - before for site in range(out.shape[axis])]
        ends = [start + windows.kernel[axis] for start in starts]
        counts.append([min(end, size + after) - max(start, first) for start, end in zip(starts, ends, strict=True)])
    if all(len(set(count)) == 1 for count in counts):
        return float(math.prod([count[0] for count in counts]))

    def build() -> Tensor:
        total = torch.ones((), dtype=torch.float32, device=out.device)
        for count in counts:
            total = total[..., None] * torch.tensor(count, dtype=torch.float32, device=out.device)
        return gather_rows(total.expand(out.batch, 1, *total.shape).contiguous(), out)

    return cached_table(out.tiles, ("divisors", out.tile, layout.tile, windows, count_include_pad), build)
