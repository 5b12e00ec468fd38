"""The arguments of sliding windows: of convolutions and poolings, and of the padding before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.common.once import remember
from sparsecnx.functions.table import METHODS, answers, channels_first, like, refuse
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.nested_order import children_are_consecutive
from sparsecnx.tensor import SparseTensor, answer


class Window(NamedTuple):
    """A window on the layout of its input.

    Attributes:
        kernel, stride, dilation: sites along each axis.
        before, after: padding before the first and after the last site of each axis.
        dense: whether an ordinary tensor comes out: the stride is below the tile, or one site is left per axis.
        children: where the windows part the sites, and those of each are consecutive rows, how many they are; else 0.
        whole: whether one window, without padding, takes all sites.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    dense: bool
    children: int = 0
    whole: bool = False


class Padded:
    """A SparseTensor with a border of padding, which the convolution or pooling that follows takes as its own.

    A border has no rows of its own, so that it cannot be kept any other way. The rows are those of the input, without a
    copy, so that `x` raises an error if they have been changed since.
    """

    __slots__ = ("_x", "after", "before", "value", "version")

    def __init__(self, x: SparseTensor, before: tuple[int, ...], after: tuple[int, ...], value: float) -> None:
        self.version = -1
        if torch.compiler.is_compiling() or x.features.is_inference():  # They count no versions.
            x = like(x, x.features.clone())
        else:
            self.version = x.features._version
        self._x, self.before, self.after, self.value = x, before, after, value

    @property
    def x(self) -> SparseTensor:
        if self.version >= 0 and self._x.features._version != self.version:
            refuse("pad", "its input was changed in place before the convolution or pooling that follows",
                   "call F.pad after the change, or give it x.clone()")  # fmt: skip
        return self._x

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = TAKE_PADDING.get(function)
        if handler is None:
            refuse(function, "its input comes from F.pad, whose border only a convolution or pooling takes",
                   "call those next, or x.dense() before the padding")  # fmt: skip
        return answer(function, handler, args, kwargs)

    def dense(self, fill: float, value: float) -> Tensor:
        """Return a dense tensor with the border: `fill` at masked sites, `value` in the border."""
        border = [side for pair in zip(self.before[::-1], self.after[::-1], strict=True) for side in pair]
        return F.pad(self.x.dense(fill), border, value=value)

    @property
    def shape(self) -> torch.Size:
        x, added = self.x, [a + b for a, b in zip(self.before, self.after, strict=True)]
        space = (size + more for size, more in zip(x.layout.shape, added, strict=True))
        return torch.Size((*x.shape[:2], *space))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.x.ndim

    ndim = property(dim)
    dtype = property(lambda self: self.x.dtype)
    device = property(lambda self: self.x.device)
    requires_grad = property(lambda self: self.x.requires_grad)

    def contiguous(self, *args: Any, **kwargs: Any) -> Padded:
        return self


TAKE_PADDING: dict[Any, Any] = {}  # handlers of the functions that do


def refuse_methods_of_padding() -> None:
    """Give Padded the methods of SparseTensor as errors, once the table is whole."""

    def method(name: str) -> Any:
        return lambda self, *args, **kwargs: Padded.__torch_function__(f"Tensor.{name}", ())

    for name in METHODS - set(vars(Padded)):
        setattr(Padded, name, method(name))


@answers(
    "pad",
    meaning="a border for the convolution or pooling that follows; beside the channels values as everywhere",
    limits="mode constant; no other function takes the border",
)
def pad(
    x: SparseTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> SparseTensor | Padded:
    if mode != "constant" and any(pad):  # Networks also pad by a difference of extents that is nothing.
        refuse("pad", f"mode is {mode!r}, which copies sites across the border of a mask", "pad with zeros")
    x = channels_first(x, "pad")
    space = list(pad[: 2 * x.layout.ndim]) + [0] * (2 * x.layout.ndim - len(pad))
    before, after = tuple(space[-2::-2]), tuple(space[::-2])
    beside = tuple(pad[2 * x.layout.ndim :])
    if any(beside[2:]) or min(space) < 0:
        refuse("pad", f"pad is {tuple(pad)}", "it adds sites or channels, and does not remove any")
    if any(beside):
        x = like(x, F.pad(x.features, beside, value=value))
    return x if not any(space) else Padded(x, before, after, value or 0.0)


_plans: dict[Any, Window] = {}


def plan(
    name: str,
    x: SparseTensor,
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any = 1,
    extra: Padded | None = None,
    ceil: bool = False,
) -> Window:
    """Return a window in tuples. Its output must have extent / stride sites per axis.

    Raises:
        ValueError: another extent would come out, or the stride does not divide the tile.
    """
    layout = x.layout
    more = None if extra is None else (extra.before, extra.after)
    key = (
        name,
        kernel,
        _hashable(stride),
        _hashable(padding),
        _hashable(dilation),
        layout.shape,
        layout.tile,
        layout.tiles.below_tile,
        more,
        ceil,
    )
    if torch.compiler.is_compiling():
        return _plan(name, x, kernel, stride, padding, dilation, more, ceil)
    try:
        found = _plans.get(key)
    except TypeError:  # Sizes that torch traces have no hash.
        return _plan(name, x, kernel, stride, padding, dilation, more, ceil)
    return found or remember(_plans, key, _plan(name, x, kernel, stride, padding, dilation, more, ceil))


_others: WeakKeyDictionary[Layout, dict[Any, Layout]] = WeakKeyDictionary()


def coarsened(layout: Layout, stride: tuple[int, ...]) -> Layout:
    """Return `layout.coarsen(stride)`, the same object at every call."""
    return another(Layout.coarsen, layout, stride)


def refined(layout: Layout, factor: tuple[int, ...]) -> Layout:
    """Return `layout.refine(factor)`, the same object at every call."""
    return another(Layout.refine, layout, factor)


def another(change: Callable[[Layout, tuple[int, ...]], Layout], layout: Layout, steps: tuple[int, ...]) -> Layout:
    """Return `change(layout, steps)`, the same object at every call; with steps of 1 `layout` itself may come out."""
    if torch.compiler.is_compiling() or max(steps) == 1:  # A layout kept as its own value would live for ever.
        return change(layout, steps)
    found = _others.setdefault(layout, {})
    other = found.get((change, steps))
    if other is None:
        other = found[change, steps] = change(layout, steps)
    return other


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    """Return an argument such as a stride for every axis.

    Raises:
        TypeError: it is neither an integer, of NumPy or torch too, nor several.
        ValueError: it has several numbers, and not one for each of `ndim` axes.
    """
    if isinstance(value, int):
        return (value,) * ndim
    if hasattr(value, "__index__") and not getattr(value, "ndim", 0):
        return (int(value),) * ndim
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TypeError(f"{value!r} is a {type(value).__name__}: expected an integer, or one for each of {ndim} axes")
    given = tuple(value)
    if len(given) not in (1, ndim):
        raise ValueError(f"{given} has {len(given)} numbers: expected one, or one for each of {ndim} axes of space")
    return given * ndim if len(given) == 1 else given


def _plan(
    name: str,
    x: SparseTensor,
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    more: tuple[tuple[int, ...], tuple[int, ...]] | None,
    ceil: bool,
) -> Window:
    layout = x.layout
    ndim, shape = layout.ndim, layout.shape
    check_axes(name, layout, kernel)
    strides, dilations = per_axis(stride, ndim), per_axis(dilation, ndim)
    for what, numbers in (("kernel", kernel), ("stride", strides), ("dilation", dilations)):
        if min(numbers) < 1:
            raise ValueError(f"{name}: {what} is {numbers}: expected 1 or more")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"{name}: padding is {padding!r}: expected 'same', 'valid', or sites")
    if padding == "same" and max(strides) > 1:
        raise ValueError(
            f"{name}: padding is 'same' and stride {strides}: expected stride 1; F.pad pads before strides"
        )
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    if padding == "same":
        before = tuple((span - 1) // 2 for span in spans)
        after = tuple(span - 1 - b for span, b in zip(spans, before, strict=True))
    else:
        before = after = (0,) * ndim if padding == "valid" else per_axis(padding, ndim)
    if more is not None:
        before = tuple(a + b for a, b in zip(before, more[0], strict=True))
        after = tuple(a + b for a, b in zip(after, more[1], strict=True))
    out = []
    borders = (0,) * ndim if more is None else more[1]
    for size, span, s, b, a, bordered in zip(shape, spans, strides, before, after, borders, strict=True):
        steps = size + b + a - span
        count = (-(-steps // s) if ceil else steps // s) + 1
        if ceil and (count - 1) * s >= size + b + bordered:  # torch lets no window begin in the padding after that.
            count -= 1
        out.append(count)
    expected = [size // s for size, s in zip(shape, strides, strict=True)]
    # A window as wide as the image, as in heads, or wider with ceil_mode, leaves one site.
    covers = all(span >= size for span, size in zip(spans, shape, strict=True))
    whole = covers and max(out) == min(out) == 1 and not any(before) and not any(after)
    divides = not any(side % s for side, s in zip(layout.tile, strides, strict=True))
    if whole and not (divides and out == expected):
        return Window(kernel, strides, before, after, dilations, True, whole=True)
    if not divides:
        if layout.tiles.below_tile == "dense":
            return Window(kernel, strides, before, after, dilations, True)
        try:
            layout.coarsen(strides[0] if len(set(strides)) == 1 else strides)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if out != expected:
        raise ValueError(
            f"{name}: kernel {kernel}, stride {strides}, padding {padding} and dilation {dilations} make {tuple(out)} "
            f"sites of {tuple(shape)}: expected extent / stride, {tuple(expected)}; {_fitting(spans, strides)}"
        )
    parts = spans == kernel == strides and not any(before) and children_are_consecutive(layout.tile, strides)
    return Window(kernel, strides, before, after, dilations, False, math.prod(kernel) if parts else 0)


def check_axes(name: str, layout: Layout, kernel: tuple[int, ...]) -> None:
    """Raise unless a function such as conv2d, and its kernel, have as many axes as the space of its input."""
    ndim = layout.ndim
    if len(kernel) != ndim or not name.endswith(f"{ndim}d"):
        refuse(name, f"it goes along {name[-2]} axes: its kernel is {kernel}, and the space of x {layout.shape}",
               f"use the function of {ndim} dimensions")  # fmt: skip


def _fitting(spans: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """Return which padding gives extent / stride sites."""
    least = [max(span - step, 0) for span, step in zip(spans, strides, strict=True)]
    both = [-(-few // 2) for few in least]
    if all(2 * side <= max(span - 1, 0) for side, span in zip(both, spans, strict=True)):
        return f"padding={both[0] if len(set(both)) == 1 else tuple(both)} does"
    total = least[0] if len(set(least)) == 1 else tuple(least)
    remedy = "padding='same', or F.pad" if max(strides) == 1 else "F.pad"
    return f"{total} sites of padding per axis do, before and after together: {remedy}"


def unpadded(x: Any, name: str, values: tuple[float, ...] | None = (0.0,)) -> tuple[SparseTensor, Padded | None]:
    """Return the SparseTensor of an input, and the padding of F.pad around it, which must have one of the values."""
    if isinstance(x, Padded):
        if values is not None and x.value not in values:
            refuse(name, f"F.pad has put {x.value} around its input", f"its padding is {values[0]}")
        return x.x, x
    return channels_first(x, name), None
