"""Facts about a SparseTensor, its dtype, device and place in autograd, and new tensors beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecnx.functions.table import answers, like, packed, refuse, refuse_as_tuple
from sparsecnx.geometry.layout import Layout
from sparsecnx.tensor import HANDLERS, SparseTensor

PROPERTIES = [
    "requires_grad",
    "is_leaf",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_mps",
    "is_xpu",
    "itemsize",
    "grad_fn",
    "is_quantized",
    "is_nested",
    "names",
]


def _property(name: str) -> None:
    def read(x: SparseTensor) -> Any:
        return getattr(x.features, name)

    setattr(SparseTensor, name, property(read))


for _name in PROPERTIES:
    _property(_name)
SparseTensor.ndim = property(lambda x: x.features.ndim + x.layout.ndim)  # type: ignore[attr-defined]
SparseTensor.__array_priority__ = 1000  # type: ignore[attr-defined] # numpy leaves its operators to us
SparseTensor.is_sparse = property(lambda x: False)  # type: ignore[attr-defined]
SparseTensor.grad = property(  # type: ignore[attr-defined]
    lambda x: None if x.features.grad is None else like(x, x.features.grad)
)
SparseTensor.data = property(lambda x: x.detach())  # type: ignore[attr-defined]


def _asked_of_features(name: str) -> None:
    def handler(x: SparseTensor, *args: Any) -> Any:
        return getattr(x.features, name)(*args)

    answers(name, meaning="as that of the features")(handler)


for _name in ["is_floating_point", "is_complex", "is_inference", "element_size", "get_device", "is_signed"]:
    _asked_of_features(_name)


def _converts(name: str) -> None:
    def handler(x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
        kwargs.pop("memory_format", None)
        features = getattr(x.features, name)(*args, **kwargs)
        return x if features is x.features else like(x, features)

    answers(name, meaning="of the features")(handler)


for _name in ["float", "half", "bfloat16", "double", "short", "int", "long", "bool", "detach", "clone"]:
    _converts(_name)


@answers("type_as", meaning="in the dtype, and on the device, of the features or of an ordinary tensor")
def type_as(x: Any, other: Any) -> Any:
    return x.to(other.device, other.dtype)


@answers("type", meaning="of the features; without argument the name of their type")
def type_(x: SparseTensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    return x.features.type() if dtype is None else _converted(x, x.features.type(dtype, non_blocking))


@answers("to", "cpu", "cuda", meaning="of the features and the layout; memory formats do not apply to rows")
def to(x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    kwargs.pop("memory_format", None)
    args = tuple(value.features if isinstance(value, SparseTensor) else value for value in args)
    if not args and not kwargs:
        return x
    return _converted(x, x.features.to(*args, **kwargs))


def _converted(x: SparseTensor, features: Tensor) -> SparseTensor:
    if features is x.features:
        return x
    if features.device == x.layout.device:
        return like(x, features)
    return packed(features, _moved(x.layout, features.device), x.channels_last)


def _moved(layout: Layout, device: torch.device) -> Layout:
    return Layout(layout.tiles.to(device), layout.tile, layout.stride)


def _moves(kind: str) -> Callable[..., SparseTensor]:
    def handler(x: SparseTensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> SparseTensor:
        return to(x, kind if device is None else device, non_blocking=non_blocking)

    return handler


for _name in ("cpu", "cuda"):
    HANDLERS[getattr(Tensor, _name)] = _moves(_name)
    setattr(SparseTensor, _name, _moves(_name))


@answers("requires_grad_", meaning="of the features")
def requires_grad_(x: SparseTensor, requires_grad: bool = True) -> SparseTensor:
    x.features.requires_grad_(requires_grad)
    return x


@answers("retain_grad", meaning="of the features: `x.features.grad`")
def retain_grad(x: SparseTensor) -> None:
    x.features.retain_grad()


@answers("register_hook", meaning="the hook gets the gradient as a SparseTensor, and may return another")
def register_hook(x: SparseTensor, hook: Callable[[SparseTensor], Any]) -> Any:
    def on_features(grad: Tensor) -> Tensor | None:
        changed = hook(like(x, grad))
        return changed.features if isinstance(changed, SparseTensor) else changed

    return x.features.register_hook(on_features)


def _new(name: str) -> None:
    def handler(x: SparseTensor, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(x.features, name)(*args, **kwargs)

    answers(name, meaning="an ordinary tensor of the dtype and device of the features")(handler)


for _name in ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]:
    _new(_name)


def _like(name: str) -> None:
    function = getattr(torch, name)

    def handler(x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
        kwargs.pop("memory_format", None)
        return like(x, function(x.features, *args, **kwargs))

    answers(name, meaning="on the same sites")(handler)


for _name in ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"]:
    _like(_name)


def _error(name: str, why: str, remedy: str) -> None:
    def handler(*args: Any, **kwargs: Any) -> Any:
        refuse_as_tuple()
        refuse(name, why, remedy)

    answers(name, meaning="an error", limits=remedy)(handler)


for _name in ("__bool__", "__float__", "__int__", "item", "tolist", "numpy", "__array__", "__iter__"):
    _error(
        _name, "its visible sites are many values", "reduce it first, for example x.sum(); x.features holds the rows"
    )
for _name in ("__dlpack__", "__dlpack_device__"):  # torch.as_tensor(x) and torch.tensor(x) ask for them.
    _error(
        _name, "it is no torch.Tensor", "x.as_tensor() is one that answers the same functions, x.dense() a dense one"
    )


@answers("__len__", meaning="the size of the batch")
def length(x: SparseTensor) -> int:
    return x.layout.batch
