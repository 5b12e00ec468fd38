"""The window of a convolution: which sites each output site reads, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecnx.geometry import tile_maps

MOST_KERNEL, MOST_EXTENT = 1023, 2**20  # as the compiled operators have it


class Window(tile_maps.Window):
    """Output site `o` reads input sites `o * stride - padding + tap * dilation`: one number of each for every axis."""

    __slots__ = ()

    @property
    def extent(self) -> tuple[int, ...]:
        """Return the sites from the first to the last tap along each axis, both counted."""
        return tuple(step * (size - 1) + 1 for size, step in zip(self.kernel, self.dilation, strict=True))

    @property
    def centred(self) -> bool:
        """Return whether each output lies in the middle of its window, without stride or dilation."""
        middle = all(size == 2 * before + 1 for size, before in zip(self.kernel, self.padding, strict=True))
        return middle and self.extent == self.kernel and max(self.stride) == 1

    @property
    def partitions(self) -> bool:
        """Return whether every input site is read once: kernel = stride, no padding."""
        return self.kernel == self.stride == self.extent and not any(self.padding)


def make_window(
    kernel: Sequence[int],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | None,
    dilation: int | tuple[int, ...],
) -> Window:
    """Return the window of these numbers, one for every axis or one for all. The default padding is that of `ops.conv`.

    Raises:
        ValueError: there are not as many as axes, or these are more than 3, or kernel, dilation or padding is out of
            range. Layouts refuse strides.
    """
    ndim = len(kernel)
    if not 1 <= ndim <= 3:
        raise ValueError(
            f"kernel is {tuple(kernel)}: expected 1 to 3 axes; `ops.mapped_conv` takes sites of any dimension"
        )
    if max(kernel) > MOST_KERNEL:
        most = f"at most {MOST_KERNEL} sites along an axis; divide it into several convolutions, or use dilation"
        raise ValueError(f"kernel is {tuple(kernel)}: expected {most}")
    steps, spread = per_axis(stride, ndim, "stride"), per_axis(dilation, ndim, "dilation")
    if min(spread) < 1:
        raise ValueError(f"dilation is {dilation}: expected 1 or more")
    window = Window(tuple(kernel), steps, (0,) * ndim, spread)
    if max(window.extent) > MOST_EXTENT:
        raise ValueError(
            f"dilation is {dilation}: a kernel {window.kernel} reaches over {max(window.extent)} sites, expected "
            f"at most {MOST_EXTENT}"
        )
    if padding is None:
        return window._replace(padding=_default_padding(window))
    before = per_axis(padding, ndim, "padding")
    if not all(0 <= zeros < size for zeros, size in zip(before, window.extent, strict=True)):
        most = "k - 1" if window.extent == window.kernel else "dilation * (k - 1)"
        raise ValueError(f"padding is {padding}: expected 0 to {most} for each axis of a kernel {window.kernel}")
    return window._replace(padding=before)


def per_axis(value: int | tuple[int, ...], ndim: int, name: str) -> tuple[int, ...]:
    """Return one number for each axis; raise ValueError where `value` has another number of them."""
    numbers = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(numbers) != ndim:
        raise ValueError(f"{name} is {value}: expected a number, or one for each of {ndim} axes")
    return numbers


def _default_padding(window: Window) -> tuple[int, ...]:
    return tuple(
        0 if extent == stride else extent // 2 if extent % 2 else max(extent - stride, 0) // 2
        for extent, stride in zip(window.extent, window.stride, strict=True)
    )
