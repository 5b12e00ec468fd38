"""Functions along one dimension, which has to be one of channels: softmax, sorting, parts of channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sparsecnx.functions.table import Handler, answers_each, channel_axis, dimensions, kind, like, refuse
from sparsecnx.tensor import SparseTensor

REQUIRED = object()  # in the place of a default
WHOLE = str.split("all any prod count_nonzero nansum nanmean median nanmedian")  # without dim: of all visible sites
# Names, where `dim` is among the arguments after the input, and what it is if it is not given.
ALONG: list[tuple[str, int, Any]] = [
    ("softmax log_softmax softmin argmax argmin logsumexp", 0, REQUIRED),
    ("cumsum cumprod logcumsumexp cummax cummin mode", 0, REQUIRED),
    (" ".join(WHOLE), 0, REQUIRED),
    ("glu sort argsort", 0, -1),
    ("topk kthvalue diff", 1, -1),
    ("gumbel_softmax", 3, -1),
    ("normalize", 1, 1),
    ("roll repeat_interleave", 1, REQUIRED),
    ("unbind", 0, 0),
    ("chunk split split_with_sizes tensor_split", 1, 0),
    ("unflatten narrow select index_select", 0, REQUIRED),
]


def _along(place: int, default: Any, name: str, function: Any) -> Handler:
    """Return a handler that calls `function` on the features, with the dimension of these."""
    key = "dims" if name == "roll" else "dim"

    def handler(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, SparseTensor):
            refuse(name, f"its input is {kind(x)}", "only the input can be a SparseTensor")
        dim = args[place] if len(args) > place else kwargs.pop(key, default)
        if dim is REQUIRED or dim is None:
            if name in WHOLE:
                return function(x.features, **kwargs)
            refuse(name, "dim is None, which flattens batch and space", "name the dimension of channels")
        if isinstance(dim, Sequence):
            axis: Any = [channel_axis(x, d, name) for d in dimensions(dim, x.features.ndim + x.layout.ndim, name)]
        else:
            axis = channel_axis(x, dim, name)
        if len(args) > place:
            args = *args[:place], axis, *args[place + 1 :]
        else:
            kwargs[key] = axis
        found = function(x.features, *args, **kwargs)
        if isinstance(found, Tensor):
            return like(x, found)
        parts = tuple(like(x, part) for part in found)
        return parts if type(found) in (tuple, list) else type(found)(parts)  # such as torch.return_types.sort

    return handler


for _names, _place, _default in ALONG:
    answers_each(
        *_names.split(),
        make=partial(_along, _place, _default),
        meaning="over channels, or parts of them" + ("; without dim of all visible sites" if "any" in _names else ""),
        limits="dim is one of channels",
    )
