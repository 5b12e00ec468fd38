"""Pooling over windows, and over all of space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.common.once import once
from sparsecnx.functions.elementwise import HANDLER_OF
from sparsecnx.functions.reductions import EXTREMA, mean
from sparsecnx.functions.reductions import sum as total
from sparsecnx.functions.table import Handler, answers, axes, channels_first, like, refuse
from sparsecnx.functions.windows import TAKE_PADDING, Padded, Window, coarsened, per_axis, plan, unpadded
from sparsecnx.geometry.layout import Layout
from sparsecnx.ops import pooling
from sparsecnx.ops.checks import check_sparse
from sparsecnx.ops.convolution.window import Window as Taps
from sparsecnx.ops.convolution.window import make_window
from sparsecnx.tensor import HANDLERS, SparseTensor, packed


def every_site(x: SparseTensor, stride: tuple[int, ...]) -> SparseTensor:
    """Return every `stride`-th site of each axis, from the first."""
    if x.channels_last or x.features.ndim != 2:
        refuse("__getitem__", f"x is {tuple(x.shape)}", "bring it to (B, C, *spatial) first")
    return HANDLERS[getattr(F, f"max_pool{len(stride)}d")](x, 1, stride)


def _steps(stride: Any, kernel: tuple[int, ...]) -> Any:
    """Return a stride; where none is given, it is the kernel."""
    return kernel if stride is None or stride in ((), []) else stride


@once
def _taps(window: Window) -> Taps:
    """Return a window as operators take it, checked."""
    return make_window(window.kernel, window.stride, window.before, window.dilation)


def _prepared(x: SparseTensor, window: Window) -> tuple[Taps, Layout]:
    """Check the features, and return the window and the layout that operators take."""
    check_sparse(x)
    return _taps(window), coarsened(x.layout, window.stride)


def _max_pool(name: str) -> Handler:
    dense = getattr(F, name)

    def handler(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        x, extra = unpadded(input, name, None)
        kernel = per_axis(kernel_size, x.layout.ndim)
        window = plan(name, x, kernel, _steps(stride, kernel), padding, dilation, extra, ceil_mode)
        if window.dense:
            border = per_axis(padding, x.layout.ndim)
            return _dense_max_pool(
                x, extra, lambda images: dense(images, kernel, window.stride, border, window.dilation, ceil_mode)
            )
        taps, coarse = _prepared(x, window)
        out = packed(pooling.max_operator(x, taps, coarse), coarse)
        if extra is None or extra.value == -math.inf:
            return out
        return HANDLER_OF["maximum"](out, _reaching(window, extra))

    return handler


def _dense_max_pool(x: SparseTensor, extra: Padded | None, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Return maxima over visible sites and the border of F.pad as an ordinary tensor, 0 where there are none."""
    seen = packed(x.features.new_ones(x.layout.rows, 1), x.layout)
    if extra is None:
        images, some = x.dense(-math.inf), seen.dense()
    else:
        images = extra.dense(-math.inf, extra.value)
        some = Padded(seen, extra.before, extra.after, 0.0).dense(0.0, float(extra.value > -math.inf))
    return torch.where(pool(some) > 0, pool(images), 0)


def _reaching(window: Window, extra: Padded) -> Tensor:
    """Return the value of F.pad where a window meets its border, -inf elsewhere: `(1, 1, *spatial)` of the output."""
    x = extra.x
    meets = torch.zeros((), dtype=torch.bool, device=x.device)
    for size, k, step, first, d, before, after in zip(
        x.layout.shape, window.kernel, window.stride, window.before, window.dilation, extra.before, extra.after,
        strict=True,
    ):  # fmt: skip
        starts = torch.arange(size // step, device=x.device) * step - first
        sites = starts[:, None] + d * torch.arange(k, device=x.device)
        border = ((sites >= -before) & (sites < 0)) | ((sites >= size) & (sites < size + after))
        meets = meets[..., None] | border.any(1)
    return torch.where(meets, extra.value, -math.inf).to(x.dtype)[None, None]


for _name in ("max_pool1d", "max_pool2d", "max_pool3d"):
    _handler = answers(
        _name,
        meaning="masked sites do not compete; what F.pad has put around does",
        limits="no indices; extents and tiles as conv2d",
    )(_max_pool(_name))
    TAKE_PADDING[getattr(F, _name)] = _handler


def _with_indices(name: str) -> Handler:
    def handler(*args: Any, **kwargs: Any) -> Any:
        refuse(name, "its indices would be places in space", "pool without indices")

    return handler


for _name in ("max_pool", "adaptive_max_pool", "fractional_max_pool"):
    for _axes in ("1d", "2d", "3d"):
        if hasattr(F, f"{_name}{_axes}_with_indices"):
            answers(f"{_name}{_axes}_with_indices", meaning="an error", limits="pool without indices")(
                _with_indices(f"{_name}{_axes}")
            )


def _avg_pool(name: str) -> Handler:
    dense = getattr(F, name)

    def handler(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        x, extra = unpadded(input, name)
        kernel = per_axis(kernel_size, x.layout.ndim)
        window = plan(name, x, kernel, _steps(stride, kernel), padding, 1, extra, ceil_mode)
        if not x.features.is_floating_point():
            refuse(name, f"x is {x.dtype}", "convert it to floats first")
        if window.dense:
            if window.whole:
                if divisor_override is None:
                    return mean(x, tuple(axes(x)[1]), True)
                return total(x, tuple(axes(x)[1]), True) / divisor_override
            images = x.dense() if extra is None else extra.dense(0.0, extra.value)
            override = () if divisor_override is None else (divisor_override,)  # avg_pool1d has none.
            return dense(images, kernel, window.stride, per_axis(padding, x.layout.ndim), ceil_mode, count_include_pad,
                         *override)  # fmt: skip
        if window.children and divisor_override is None:
            coarse = coarsened(x.layout, window.stride)
            return packed(x.features.reshape(coarse.rows, window.children, x.features.shape[1]).mean(1), coarse)
        if extra is not None and divisor_override is None:  # What F.pad adds are values like any other.
            sizes = zip(x.layout.shape, window.before, window.after, kernel, window.stride, strict=True)
            beyond = ceil_mode and any((size + b + a - k) % s for size, b, a, k, s in sizes)
            if beyond or (any(per_axis(padding, x.layout.ndim)) and not count_include_pad):
                refuse(name, "F.pad is followed by padding that counts otherwise", "give all of it to one of them")
            divisor_override = math.prod(kernel)
        taps, coarse = _prepared(x, window)
        return packed(pooling.means(x, taps, coarse, count_include_pad, divisor_override), coarse)

    return handler


for _name in ("avg_pool1d", "avg_pool2d", "avg_pool3d"):
    _handler = answers(
        _name,
        meaning="masked sites count as zeros, as padding does; divides by what the arguments say; a window of the "
        "whole extent, or wider with ceil_mode, is adaptive pooling to 1",
        limits="extents and tiles as conv2d",
    )(_avg_pool(_name))
    TAKE_PADDING[getattr(F, _name)] = _handler


def _adaptive(name: str, kind: str) -> Handler:
    def handler(input: SparseTensor, output_size: Any, return_indices: bool = False) -> Any:
        x = channels_first(input, name)
        ndim, space = x.layout.ndim, x.layout.shape
        given = (output_size,) * ndim if isinstance(output_size, int) else tuple(output_size)
        if len(given) != ndim or not name.endswith(f"{ndim}d"):
            refuse(name, f"it goes along {name[-2]} axes: output_size is {output_size}, the space of x {space}",
                   f"use the function of {ndim} dimensions")  # fmt: skip
        sizes = tuple(s if g is None else g for g, s in zip(given, space, strict=True))
        if all(size == 1 for size in sizes):
            return (mean if kind == "avg" else EXTREMA["amax"])(x, tuple(axes(x)[1]), True)
        if sizes == x.layout.shape:
            return like(x, x.features.clone())
        if any(size < 1 or s % size for size, s in zip(sizes, space, strict=True)):
            raise ValueError(f"{name}: output_size is {output_size}: expected 1, or a divisor of {space}")
        step = tuple(s // size for size, s in zip(sizes, x.layout.shape, strict=True))
        return HANDLERS[getattr(F, name.removeprefix("adaptive_"))](x, step, step)

    return handler


for _kind in ("avg", "max"):
    for _axes in ("1d", "2d", "3d"):
        _name = f"adaptive_{_kind}_pool{_axes}"
        answers(
            _name,
            meaning="to 1: over the visible sites of each image, an ordinary tensor; to the present extent: no change; "
            "to a divisor",
            limits="other sizes, and indices",
        )(_adaptive(_name, _kind))


def _lp_pool(name: str) -> Handler:
    dense, largest = getattr(F, name), getattr(F, name.replace("lp", "max"))

    def handler(
        input: SparseTensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Any:
        x = channels_first(input, name)
        kernel = per_axis(kernel_size, x.layout.ndim)
        if norm_type == math.inf:
            return HANDLERS[largest](like(x, x.features.abs()), kernel, stride, 0, 1, ceil_mode)
        if norm_type in (0, -math.inf):
            raise ValueError(f"norm_type is {norm_type}: expected another number than 0 and -inf")
        window = plan(name, x, kernel, _steps(stride, kernel), 0, 1, None, ceil_mode)
        if window.dense:
            return dense(x.dense(), norm_type, kernel, window.stride, ceil_mode)
        powers = like(x, x.features.pow(norm_type))
        taps, coarse = _prepared(x, window)
        # As torch does: a mean times the sites of a whole window, also over the border.
        means = pooling.means(powers, taps, coarse, True, None)
        return packed((means.sign() * F.relu(means.abs())).mul(math.prod(kernel)).pow(1 / norm_type), coarse)

    return handler


for _name in ("lp_pool1d", "lp_pool2d", "lp_pool3d"):
    answers(_name, meaning="masked sites count as zeros", limits="extents and tiles as conv2d")(_lp_pool(_name))
