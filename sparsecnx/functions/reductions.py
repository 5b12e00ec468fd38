"""Means, sums, norms and extrema: over space of the visible sites alone, and over channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecnx.functions.elementwise import HANDLER_OF
from sparsecnx.functions.table import Handler, answers, axes, dimensions, like, put, refuse
from sparsecnx.tensor import SparseTensor

SPACE = "reduce all dimensions of space together, or call this on x.dense()"


def per_image(x: Tensor, layout: Any, kind: str) -> Tensor:
    """Return the sum, amax or amin `(B, *channels)` over the rows of each image; 0 for an image without any."""
    count = layout.rows_per_image
    if count == 0:
        return x.new_zeros(layout.batch, *x.shape[1:]) + 0 * x.sum()
    if count is not None:
        return getattr(x.reshape(layout.batch, count, *x.shape[1:]), kind)(1)
    image, blank = layout.row_image(), x.new_zeros(layout.batch, *x.shape[1:])
    if kind == "sum":
        return blank.index_add(0, image, x)
    place = image.long().view(-1, *([1] * (x.ndim - 1))).expand_as(x)
    if x.dtype == torch.bool:  # torch has no scatter of these.
        return blank.byte().scatter_reduce(0, place, x.byte(), kind, include_self=False).bool()
    if x.is_floating_point():  # Its gradient takes a value in the blank that equals the extremum for one of the rows.
        blank = torch.full_like(blank, math.nan)
    found = blank.scatter_reduce(0, place, x, kind, include_self=False)
    return found.masked_fill((layout.row_splits.diff() == 0).view(-1, *([1] * (x.ndim - 1))), 0)


def wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype that torch sums it in."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x if x.is_floating_point() or x.is_complex() else x.long()


def rows_of_images(layout: Any, like: Tensor) -> Any:
    """Return how many rows each image has, at least 1: a number, or a tensor `(B, 1, ...)`."""
    if layout.rows_per_image is not None:
        return max(layout.rows_per_image, 1)
    counts = layout.row_splits.diff().clamp_min(1)
    return counts.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


def _dims(x: SparseTensor, dim: Any, name: str) -> tuple[list[int], list[int], bool, bool]:
    """Return the dimensions of a reduction, those of features among them, and whether space and batch are reduced."""
    given = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim) or range(x.ndim)
    dims = sorted(dimensions(given, x.ndim, name))
    channels, spatial = axes(x)
    space = [d in dims for d in spatial]
    if any(space) and not all(space):
        refuse(name, f"dim is {dim} of {tuple(x.shape)}, a part of space, of which only visible sites exist", SPACE)
    batch = 0 in dims
    if batch and not all(space):
        refuse(name, f"dim is {dim}, over images without space, whose visible sites are at other places", SPACE)
    return dims, [d - channels[0] + 1 for d in dims if d in channels], all(space), batch


def _shaped(x: SparseTensor, out: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Give an ordinary result the dimensions that keepdim asks for."""
    if not keepdim:
        return out
    return out.reshape([1 if d in dims else size for d, size in enumerate(x.shape)])


def reduce(name: str, x: SparseTensor, dim: Any, keepdim: bool, whole: Callable[..., Tensor],
           images: Callable[[Tensor, Any, list[int]], Tensor]) -> Any:  # fmt: skip
    """Reduce `x`: over channels to a SparseTensor, over space (and more) to an ordinary tensor.

    Args:
        whole: reduces dimensions of the features, `(features, dims, keepdim)`.
        images: reduces the rows of each image and dimensions of channels, `(features, layout, dims)`.
    """
    dims, of_features, space, batch = _dims(x, dim, name)
    if not space:
        return like(x, whole(x.features, of_features, keepdim))
    if batch:
        return _shaped(x, whole(x.features, [0, *of_features], False), dims, keepdim)
    return _shaped(x, images(x.features, x.layout, of_features), dims, keepdim)


def _mean_of_images(x: Tensor, layout: Any, dims: list[int]) -> Tensor:
    if layout.rows_per_image:
        return x.reshape(layout.batch, layout.rows_per_image, *x.shape[1:]).mean([1, *(d + 1 for d in dims)])
    if not (x.is_floating_point() or x.is_complex()):
        refuse("mean", f"x is {x.dtype}", "x.mean(..., dtype=torch.float32) is of floats")
    rows = wide(x)
    total = per_image(rows.mean(dims) if dims else rows, layout, "sum")
    return (total / rows_of_images(layout, total)).to(x.dtype)


def _sum_of_images(x: Tensor, layout: Any, dims: list[int]) -> Tensor:
    if layout.rows_per_image:
        return x.reshape(layout.batch, layout.rows_per_image, *x.shape[1:]).sum([1, *(d + 1 for d in dims)])
    rows = wide(x)
    total = per_image(rows.sum(dims) if dims else rows, layout, "sum")
    return total.to(x.dtype) if x.is_floating_point() else total


def _dtype_first(x: SparseTensor, dtype: torch.dtype | None) -> SparseTensor:
    return x if dtype is None or dtype == x.dtype else like(x, x.features.to(dtype))


@answers("mean", meaning="over space: of the visible sites of each image, an ordinary tensor; over channels",
         limits="space is reduced as a whole")  # fmt: skip
def mean(x: SparseTensor, dim: Any = None, keepdim: bool = False, *,
         dtype: torch.dtype | None = None) -> Any:  # fmt: skip
    x = _dtype_first(x, dtype)
    return reduce("mean", x, dim, keepdim, lambda v, d, k: v.mean(d, k), _mean_of_images)


@answers("sum", meaning="as mean", limits="as mean")
def sum(x: SparseTensor, dim: Any = None, keepdim: bool = False, *,
         dtype: torch.dtype | None = None) -> Any:  # fmt: skip
    x = _dtype_first(x, dtype)
    return reduce("sum", x, dim, keepdim, lambda v, d, k: v.sum(d, k), _sum_of_images)


def _extremum(name: str) -> Handler:
    def images(x: Tensor, layout: Any, dims: list[int]) -> Tensor:
        return per_image(getattr(x, name)(dims) if dims else x, layout, name)

    def handler(x: SparseTensor, dim: Any = (), keepdim: bool = False) -> Any:
        return reduce(name, x, None if dim == () else dim, keepdim, lambda v, d, k: getattr(v, name)(d, k), images)

    return handler


EXTREMA = {
    name: answers(name, meaning="as mean; masked sites do not compete", limits="as mean")(_extremum(name))
    for name in ("amax", "amin")
}


def _max_or_min(name: str) -> Handler:
    extremum, elementwise = EXTREMA[f"a{name}"], HANDLER_OF[f"{name}imum"]
    result = getattr(torch.return_types, name)

    def handler(x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        other = kwargs.get("other", dim)
        if isinstance(other, (Tensor, SparseTensor)):
            return elementwise(x, other)
        if dim is None:
            return extremum(x)
        _, of_features, space, batch = _dims(x, dim, name)
        if space or batch:
            refuse(name, "the indices of its answer would be places in space", f"a{name}(dim) returns values alone")
        values, indices = getattr(x.features, name)(of_features[0], keepdim)
        return result((like(x, values), like(x, indices)))

    return handler


for _name in ("max", "min"):
    answers(
        _name, meaning="of all visible sites; over channels; of two tensors", limits="not over space: amax and amin are"
    )(_max_or_min(_name))


def _variance(x: Tensor, layout: Any, dims: list[int], correction: float, root: bool) -> Tensor:
    dtype, x = x.dtype, wide(x)
    center = _mean_of_images(x, layout, dims)
    full = center
    for d in dims:
        full = full.unsqueeze(d)
    rows = full.index_select(0, layout.row_image())
    squares = _mean_of_images((x - rows).square(), layout, dims)
    count = rows_of_images(layout, center) * math.prod([x.shape[d] for d in dims])
    freedom = count - correction
    if not layout.rows_per_image:  # An image without any has the variance 0.
        freedom = torch.where(layout.row_splits.diff().view(-1, *([1] * (center.ndim - 1))) == 0, 1, freedom)
    variance = squares * count / freedom
    return (_root(variance, 2) if root else variance).to(dtype)


def _root(x: Tensor, p: float) -> Tensor:
    """Return the p-th root, whose gradient at 0 is 0, as in torch's std and norm."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).pow(1 / p))


def _spread(name: str) -> Handler:
    def handler(
        x: SparseTensor,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        *,
        correction: float | None = None,
    ) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        by = (1.0 if unbiased else 0.0) if correction is None else float(correction)

        def whole(v: Tensor, d: list[int], k: bool) -> Tensor:
            return getattr(v, name)(d, correction=by, keepdim=k)

        def images(v: Tensor, layout: Any, d: list[int]) -> Tensor:
            return _variance(v, layout, d, by, root=name == "std")

        return reduce(name, x, dim, keepdim, whole, images)

    return handler


def _with_mean(spread: Handler) -> Handler:
    def handler(x: SparseTensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        return spread(x, dim, unbiased, keepdim, **options), mean(x, dim, keepdim)

    return handler


for _name in ("var", "std"):
    _handler = answers(_name, meaning="as mean", limits="as mean")(_spread(_name))
    answers(f"{_name}_mean", meaning="as mean", limits="as mean")(_with_mean(_handler))


def _norm_of_images(x: Tensor, layout: Any, dims: list[int], p: float) -> Tensor:
    if layout.rows_per_image:
        split = x.reshape(layout.batch, layout.rows_per_image, *x.shape[1:])
        return torch.linalg.vector_norm(split, p, [1, *(d + 1 for d in dims)])
    if math.isinf(p):
        x = x.abs()
        kind = "amax" if p > 0 else "amin"
        return per_image(getattr(x, kind)(dims) if dims else x, layout, kind)
    rows = wide(x).abs()
    zero = rows == 0  # torch gives it no gradient for any p.
    powers = torch.where(zero, math.inf if p < 0 else 0, torch.where(zero, 1, rows).pow(p))
    total = _sum_of_images(powers, layout, dims)
    return (_root(total, p) if p else total).to(x.dtype)


@answers("norm", "linalg.vector_norm", meaning="as mean", limits="as mean")
def norm(x: SparseTensor, p: Any = 2, dim: Any = None, keepdim: bool = False,
         dtype: torch.dtype | None = None) -> Any:  # fmt: skip
    if p in (None, "fro"):
        p = 2.0
    if not isinstance(p, (int, float)):
        refuse("norm", f"p is {p!r}", "it takes a number")
    x = _dtype_first(x, dtype)
    return reduce("norm", x, dim, keepdim, lambda v, d, k: torch.linalg.vector_norm(v, p, d, k),
                  lambda v, layout, d: _norm_of_images(v, layout, d, float(p)))  # fmt: skip


def vector_norm(x: SparseTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *,
                dtype: torch.dtype | None = None) -> Any:  # fmt: skip
    return norm(x, ord, dim, keepdim, dtype=dtype)


put("linalg.vector_norm", vector_norm)
