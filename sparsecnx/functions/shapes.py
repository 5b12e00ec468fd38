"""Functions of the shape: sizes, order of dimensions, views of channels, parts of channels and their concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecnx.functions.elementwise import _form
from sparsecnx.functions.table import (
    answers,
    axes,
    channel_axis,
    check_same_sites,
    dimensions,
    like,
    packed,
    put,
    refuse,
    refuse_as_tuple,
)
from sparsecnx.tensor import SparseTensor

SPACE = "x.dense() is an ordinary tensor, zero at masked sites; pool over space first, or call this on the dense tensor"

PARTS = (slice, int, list, Tensor, type(None), type(Ellipsis))  # of an index, beside arrays of numpy


def _sequence(given: tuple[Any, ...], named: Any = None) -> tuple[int, ...]:
    """Return sizes or dimensions that are given one by one, as one sequence, or by name."""
    if named is not None:
        given = (named,)
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], Sequence) else given


@answers("size", meaning="the shape of the masked dense tensor")
def size(x: SparseTensor, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


@answers("dim", "ndimension", meaning="the number of dimensions of the masked dense tensor")
def dim(x: SparseTensor) -> int:
    return x.features.ndim + x.layout.ndim


@answers("numel", "nelement", meaning="the number of elements of the masked dense tensor")
def numel(x: SparseTensor) -> int:
    return math.prod(x.shape)


@answers("permute", meaning="brings the channels to the last dimension, or back; orders dimensions of channels",
         limits="space keeps its order")  # fmt: skip
def permute(x: SparseTensor, *order: Any, dims: Any = None, name: str = "permute") -> SparseTensor:
    order = tuple(dimensions(_sequence(order, dims), x.ndim, name))
    channels, spatial = axes(x)
    if len(order) != x.ndim or order[0] != 0:
        refuse(name, f"dims is {tuple(order)} of {x.ndim} dimensions, and the batch must stay first", SPACE)
    where = [order.index(d) for d in spatial]
    if where != list(range(where[0], where[0] + len(where))) or 1 < where[0] < x.ndim - len(where):
        refuse(name, f"the order {tuple(order)} would mix space with channels", SPACE)
    wanted = [d - channels[0] + 1 for d in order if d in channels]
    features = x.features if wanted == sorted(wanted) else x.features.permute(0, *wanted)
    last = bool(channels) and where[0] == 1
    return packed(features, x.layout, last)


put("permute", permute)


@answers("transpose", "swapaxes", "swapdims", meaning="as permute", limits="as permute")
def transpose(x: SparseTensor, dim0: int, dim1: int) -> SparseTensor:
    order = list(range(x.ndim))
    (first,), (second,) = dimensions((dim0,), x.ndim, "transpose"), dimensions((dim1,), x.ndim, "transpose")
    order[first], order[second] = second, first
    return permute(x, order, name="transpose")


@answers("movedim", "moveaxis", meaning="as permute", limits="as permute")
def movedim(x: SparseTensor, source: int | Sequence[int], destination: int | Sequence[int]) -> SparseTensor:
    moved = dimensions([source] if isinstance(source, int) else source, x.ndim, "movedim")
    places = dimensions([destination] if isinstance(destination, int) else destination, x.ndim, "movedim")
    order = [d for d in range(x.ndim) if d not in moved]
    for place, d in sorted(zip(places, moved, strict=True)):
        order.insert(place, d)
    return permute(x, order, name="movedim")


@answers(
    "reshape", "view", meaning="views of the channels", limits="batch and space stay; flatten of space is an error"
)
def reshape(x: SparseTensor, *given: Any, shape: Any = None, size: Any = None, name: str = "reshape") -> SparseTensor:
    if len(given) == 1 and isinstance(given[0], torch.dtype):
        refuse("view", "it would read the bits of one dtype as another", "x.to(dtype) converts")
    wanted = list(_sequence(given, size if shape is None else shape))
    if -1 in wanted:
        known = math.prod([s for s in wanted if s != -1])
        wanted[wanted.index(-1)] = math.prod(x.shape) // known if known else 0
    batch, space, channels = x.layout.batch, list(x.layout.shape), x.features.shape[1:]
    n = len(wanted) - 1 - len(space)
    if n >= 0 and wanted[0] == batch:
        count = math.prod(channels)
        first, last = wanted[1 : 1 + n], wanted[1 + len(space) :]
        if not x.channels_last and wanted[1 + n :] == space and math.prod(first) == count:
            return packed(x.features.reshape(x.features.shape[0], *first), x.layout)
        if x.channels_last and wanted[1 : 1 + len(space)] == space and math.prod(last) == count:
            return packed(x.features.reshape(x.features.shape[0], *last), x.layout, True)
    refuse(name, f"{tuple(x.shape)} would become {tuple(wanted)}, where batch or space are not what they were", SPACE)


@answers("flatten", meaning="joins dimensions of channels", limits="flatten of space is an error")
def flatten(x: SparseTensor, start_dim: int = 0, end_dim: int = -1) -> SparseTensor:
    shape = list(x.shape)
    (start,), (end,) = dimensions((start_dim,), x.ndim, "flatten"), dimensions((end_dim,), x.ndim, "flatten")
    return reshape(x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]], name="flatten")


@answers("unsqueeze", meaning="adds a dimension of channels of size 1", limits="its place is among the channels")
def unsqueeze(x: SparseTensor, dim: int) -> SparseTensor:
    (place,) = dimensions((dim,), x.ndim + 1, "unsqueeze")
    first = 1 + x.layout.ndim if x.channels_last else 1
    if not first <= place <= first + x.features.ndim - 1:
        refuse("unsqueeze", f"dim is {dim}, where {tuple(x.shape)} has no channels", SPACE)
    return like(x, x.features.unsqueeze(place - first + 1))


@answers("squeeze", meaning="removes a dimension of channels of size 1", limits="dim is one of channels")
def squeeze(x: SparseTensor, dim: int | None = None) -> SparseTensor:
    if dim is None:
        refuse(
            "squeeze", "without dim it depends on the sizes of the batch and of space", "name the dimension of channels"
        )
    return like(x, x.features.squeeze(channel_axis(x, dim, "squeeze")))


@answers("expand", meaning="repeats a single channel", limits="batch and space stay")
def expand(x: SparseTensor, *sizes: Any, size: Any = None) -> SparseTensor:
    wanted = list(_sequence(sizes, size))
    channels, _ = axes(x)
    fits = len(wanted) == x.ndim and all(
        w in (-1, s) for d, (w, s) in enumerate(zip(wanted, x.shape, strict=False)) if d not in channels
    )
    if not fits:
        refuse("expand", f"{tuple(x.shape)} would become {tuple(wanted)}", "only channels can be repeated")
    return like(x, x.features.expand(-1, *(wanted[d] for d in channels)))


@answers("expand_as", meaning="as expand; an ordinary tensor is expanded to the shape of a SparseTensor")
def expand_as(x: Any, other: Any) -> Any:
    return x.expand(other.shape)


@answers("view_as", "reshape_as", meaning="as reshape", limits="as reshape")
def view_as(x: Any, other: Any) -> Any:
    return x.reshape(other.shape)


@answers("repeat", meaning="repeats the channels", limits="batch and space stay")
def repeat(x: SparseTensor, *sizes: Any, repeats: Any = None) -> SparseTensor:
    times = list(_sequence(sizes, repeats))
    channels, _ = axes(x)
    if len(times) != x.ndim or any(count != 1 for d, count in enumerate(times) if d not in channels):
        refuse("repeat", f"sizes is {tuple(times)} for {tuple(x.shape)}", "only channels can be repeated")
    return like(x, x.features.repeat(1, *(times[d] for d in channels)))


def _same(x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    return x


answers("contiguous", meaning="no change: memory formats do not apply to rows")(_same)


@answers("is_contiguous", meaning="True: memory formats do not apply to rows")
def is_contiguous(x: SparseTensor, *args: Any, **kwargs: Any) -> bool:
    return True


@answers("cat", "concat", "concatenate", meaning="of channels; of ordinary tensors the visible sites are gathered",
         limits="dim is one of channels")  # fmt: skip
def cat(tensors: Sequence[Any], dim: int = 0) -> SparseTensor:
    x = next(value for value in tensors if isinstance(value, SparseTensor))
    place = channel_axis(x, dim, "cat")
    return like(x, torch.cat(_rows_of_all(tensors, x, "cat"), place))


@answers("stack", meaning="in a new dimension of channels", limits="dim is among the channels")
def stack(tensors: Sequence[Any], dim: int = 0) -> SparseTensor:
    x = next(value for value in tensors if isinstance(value, SparseTensor))
    if any(not isinstance(value, SparseTensor) for value in tensors):
        refuse("stack", "some are ordinary tensors", "cat takes them")
    (place,) = dimensions((dim,), x.ndim + 1, "stack")
    first = 1 + x.layout.ndim if x.channels_last else 1
    if not first <= place <= first + x.features.ndim - 1:
        refuse("stack", f"dim is {dim}, where {tuple(x.shape)} has no channels", SPACE)
    return like(x, torch.stack(_rows_of_all(tensors, x, "stack"), place - first + 1))


def _rows_of_all(tensors: Sequence[Any], x: SparseTensor, name: str) -> list[Tensor]:
    parts = []
    for value in tensors:
        if isinstance(value, SparseTensor):
            if value is not x:
                check_same_sites(x, value, name)
            parts.append(value.features)
            continue
        kind, found = _form(value, _with_channels_of(x, value, name), name)
        if kind == "image":
            found = found.index_select(0, x.layout.row_image())
        parts.append(found.expand(x.layout.rows, *found.shape[-(x.features.ndim - 1) :]))
    return parts


def _with_channels_of(x: SparseTensor, value: Tensor, name: str) -> SparseTensor:
    if value.ndim != x.ndim:
        refuse(name, f"a tensor {tuple(value.shape)} beside {tuple(x.shape)}", "they need as many dimensions")
    return x


@answers("flip", meaning="of channels", limits="dims are of channels")
def flip(x: SparseTensor, *given: Any, dims: Any = None) -> SparseTensor:
    return like(x, x.features.flip([channel_axis(x, d, "flip") for d in _sequence(given, dims)]))


@answers("channel_shuffle", "native_channel_shuffle", meaning="of channels")
def channel_shuffle(x: SparseTensor, groups: int) -> SparseTensor:
    channels = x.features.shape[1]
    if x.channels_last or x.features.ndim != 2 or channels % groups:
        refuse(
            "channel_shuffle", f"x is {tuple(x.shape)} and groups {groups}", "it needs (B, C, *spatial), C a multiple"
        )
    return like(x, x.features.unflatten(1, (groups, channels // groups)).transpose(1, 2).flatten(1))


@answers("__getitem__", meaning="parts of the channels, `x[:, a:b]`, `x[:, index]`, `x[..., a:b]`; every s-th site, "
         "`x[:, :, ::s, ::s]`", limits="batch and single pixels are not indexed")  # fmt: skip
def getitem(x: SparseTensor, index: Any) -> Any:
    given = list(index) if isinstance(index, tuple) else [index]
    given = [item if isinstance(item, PARTS) or not hasattr(item, "__array_interface__") else torch.as_tensor(item)
             for item in given]  # fmt: skip
    if any(item is None or isinstance(item, bool) for item in given):
        refuse("__getitem__", f"the index is {index!r}", "unsqueeze adds a dimension of channels")
    if Ellipsis in [item for item in given if not isinstance(item, Tensor)]:
        place = next(place for place, item in enumerate(given) if item is Ellipsis)
        given[place : place + 1] = [slice(None)] * (x.ndim - len(given) + 1)
    if len(given) > x.ndim:
        refuse("__getitem__", f"the index has {len(given)} parts for {x.ndim} dimensions", "it has too many")
    given += [slice(None)] * (x.ndim - len(given))
    channels, spatial = axes(x)
    steps = []
    for d in (0, *spatial):
        item = given[d]
        whole = isinstance(item, slice) and item.start in (None, 0) and item.stop in (None, x.shape[d])
        step = item.step or 1 if isinstance(item, slice) else 1
        if not whole or (d == 0 and step != 1) or step < 1:
            refuse_as_tuple()
            what = "the batch" if d == 0 else "space, of which only visible sites exist"
            refuse("__getitem__", f"dimension {d} is {what}, and its index {item!r}", SPACE)
        steps.append(step)
    chosen = slice(None), *(given[d] for d in channels)
    features = x.features[chosen]
    if any(step != 1 for step in steps):
        from sparsecnx.functions.pooling import every_site

        return every_site(like(x, features), tuple(steps[1:]))
    return like(x, features)


put("__getitem__", getitem)


@answers("__setitem__", meaning="an error")
def setitem(x: Any, index: Any, value: Any) -> None:
    refuse("__setitem__", "it sets no values by an index", "x.features holds the rows, which x.mul_(...) can change")
