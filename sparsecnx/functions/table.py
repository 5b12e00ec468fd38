"""The table of torch's functions that a SparseTensor answers, and what the functions of this package share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.tensor import HANDLERS, PACKAGE, SparseTensor, answer, packed, refuse

Handler = Callable[..., Any]
HOMES = {"torch": torch, "torch.nn.functional": F, "torch.Tensor": Tensor}


@dataclass(frozen=True)
class Entry:
    """One line of the table: names of torch's functions, what they mean on visible sites, and what they do not take."""

    names: tuple[str, ...]
    meaning: str
    limits: str


ENTRIES: list[Entry] = []
METHODS: set[str] = set()  # of SparseTensor, that come from this table


def answers(
    *names: str, meaning: str, limits: str = "", inplace: Callable[[str], Handler] | None = None
) -> Callable[[Handler], Handler]:
    """Enter a function into the table under the names that torch has for it.

    A name such as `relu` stands for `torch.relu`, `F.relu` and the method. The method becomes one of SparseTensor.

    Args:
        names: torch's names.
        meaning, limits: columns of the table in docs/functions.md.
        inplace: makes the handler of torch's in-place functions (`relu_`), which are entered too.
    """

    def enter(handler: Handler) -> Handler:
        ENTRIES.append(Entry(names, meaning, limits))
        for name in names:
            put(name, handler)
            if inplace is not None and any(hasattr(home, f"{name}_") for home in HOMES.values()):
                put(f"{name}_", inplace(f"{name}_"))
        return handler

    return enter


def answers_each(*names: str, make: Callable[[str, Any], Handler], meaning: str, limits: str = "") -> None:
    """Enter functions into the table whose handlers call torch's own: `make(name, function)` is that of a function."""
    ENTRIES.append(Entry(names, meaning, limits))
    for name in names:
        put_each(name, partial(make, name))


def put(name: str, handler: Handler) -> None:
    """Enter a handler for every function of torch with this name, and as a method where tensors have one."""
    put_each(name, lambda function: handler)


def put_each(name: str, make: Callable[[Any], Handler]) -> None:
    """Enter a handler for each function of torch with this name, `make(function)`. A later torch may have others."""
    if name.startswith("linalg."):
        HANDLERS[getattr(torch.linalg, name.removeprefix("linalg."))] = make(None)
        return
    for home in HOMES.values():
        function = getattr(home, name, None)
        if function is not None and callable(function):
            HANDLERS[function] = make(function)
    if callable(getattr(Tensor, name, None)):
        setattr(SparseTensor, name, _method(name, HANDLERS[getattr(Tensor, name)]))
        METHODS.add(name)


def _method(name: str, handler: Handler) -> Handler:
    """Return a handler as a method, which takes the names of torch's arguments too."""

    def method(*args: Any, **kwargs: Any) -> Any:
        return answer(name, handler, args, kwargs)

    method.__name__, method.__doc__ = name, handler.__doc__
    return method


def like(x: SparseTensor, features: Tensor) -> SparseTensor:
    """Return other features on the sites of `x`, without checks."""
    return packed(features, x.layout, x.channels_last)


# Files of torch that take the items of what they hold for a tuple, and what they are to say of a SparseTensor.
_FOR_TUPLES = {
    torch.nn.modules.module.__file__: (
        "Module.register_backward_hook",
        "this deprecated hook finds no tensor in what its module returns",
        "register a forward hook that calls register_hook() on the SparseTensor",
    ),
    torch.jit._trace.__file__: (
        "torch.jit.trace",
        "it would record this mask for all",
        "trace the module with dense images, or use torch.compile or torch.export",
    ),
}


def refuse_as_tuple() -> None:
    """Raise where torch takes a SparseTensor for a tuple, and the error should name what for."""
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename in _FOR_TUPLES:
        refuse(*_FOR_TUPLES[frame.f_code.co_filename])


def channels_first(x: Any, name: str) -> SparseTensor:
    """Return `x` where it is a SparseTensor `(B, C, *spatial)`; raise where it is not."""
    if type(x) is not SparseTensor and not isinstance(x, SparseTensor):
        refuse(name, f"its input is {kind(x)}", "only the input can be a SparseTensor")
    if x.channels_last or x.features.ndim != 2:
        refuse(name, f"x is {tuple(x.shape)}, channels {'last' if x.channels_last else x.features.shape[1:]}",
               "bring it to (B, C, *spatial) first, with permute or flatten")  # fmt: skip
    return x


def check_same_sites(x: SparseTensor, other: SparseTensor, name: str) -> None:
    """Raise unless both have the same sites, and their channels at the same place."""
    if x.layout is not other.layout:
        difference = x.layout.difference(other.layout)
        if difference is not None:
            remedy = "combine tensors of one mask and stride"
            if x.device != other.device:
                remedy = "move one of them, .to(device)"
            if x.layout.tiles.grid != other.layout.tiles.grid:
                remedy += (
                    "; the tiles of a mask of single sites follow its values: give the mask of the tiles, (B, *grid), "
                    "or make the other with x.with_features(features)"
                )
            refuse(name, f"its SparseTensors have other layouts: {difference}", remedy)
    if x.channels_last != other.channels_last or x.features.ndim != other.features.ndim:
        shapes = f"{tuple(x.shape)} and {tuple(other.shape)}"
        refuse(name, f"its SparseTensors are {shapes}, whose channels are at other places", "permute one of them")


def kind(x: object) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def axes(x: SparseTensor) -> tuple[range, range]:
    """Return the dimensions of `x` that are channels, and those that are space."""
    channels, spatial = x.features.ndim - 1, x.layout.ndim
    if x.channels_last:
        return range(1 + spatial, 1 + spatial + channels), range(1, 1 + spatial)
    return range(1, 1 + channels), range(1 + channels, 1 + channels + spatial)


def dimensions(given: Iterable[int], ndim: int, name: str) -> list[int]:
    """Return dimensions as numbers from 0.

    Raises:
        IndexError: one is out of range, as torch does.
        ValueError: one is given twice.
    """
    found = []
    for dim in given:
        if not -ndim <= dim < ndim:
            raise IndexError(f"{name}: dim is {dim}: expected {-ndim} to {ndim - 1}")
        found.append(dim % ndim)
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: dim is {tuple(given)}: expected each dimension once")
    return found


def channel_axis(x: SparseTensor, dim: int, name: str) -> int:
    """Return the dimension of the features that the dimension `dim` of `x` is; raise unless it is one of channels."""
    channels, _ = axes(x)
    (place,) = dimensions((dim,), x.features.ndim + x.layout.ndim, name)
    if place not in channels:
        what = "the batch" if place == 0 else "space"
        refuse(name, f"dim is {dim}, which is {what} in {tuple(x.shape)}", "it takes a dimension of channels")
    return place - channels[0] + 1
