"""Functions of each element: activations and arithmetic, with numbers, other SparseTensors and ordinary tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.functions.table import (
    Handler,
    answers,
    axes,
    check_same_sites,
    kind,
    like,
    packed,
    put,
    refuse,
)
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.ops.checks import check_device, check_vector
from sparsecnx.tensor import HANDLERS, SparseTensor

ACTIVATIONS = str.split("""
    relu relu6 leaky_relu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign
    softshrink hardshrink tanhshrink threshold rrelu logsigmoid
""")
UNARY = str.split("""
    abs absolute acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 fix
    floor frac lgamma log log10 log1p log2 logit nan_to_num neg negative positive rad2deg reciprocal round rsqrt sgn
    sign sin sinc sinh sqrt square tan trunc isfinite isinf isnan logical_not bitwise_not arccos arccosh arcsin
    arcsinh arctan arctanh i0 signbit isposinf isneginf
""")
NARY = str.split("""
    add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow float_power maximum
    minimum fmax fmin atan2 hypot copysign eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and
    bitwise_or bitwise_xor addcmul addcdiv lerp clamp clamp_min clamp_max clip xlogy heaviside where masked_fill
    arctan2 logaddexp logaddexp2 ldexp nextafter isclose greater greater_equal less less_equal not_equal fill copy_
""")


def _implementation(name: str) -> Callable[..., Tensor]:
    return getattr(torch, name, None) or getattr(F, name, None) or getattr(Tensor, name)


def _unary(name: str) -> Handler:
    function = getattr(F, name, None) if name in ACTIVATIONS else _implementation(name)
    assert function is not None

    def handler(x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
        out = function(x.features, *args, **kwargs)
        return x if out is x.features else like(x, out)  # The first is in place.

    handler.__name__ = name
    return handler


def combine(function: Callable[..., Tensor], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SparseTensor:
    """Apply an elementwise function to SparseTensors of the same sites, numbers, and ordinary tensors that broadcast.

    An ordinary tensor has a value for each channel, for each image and channel, or for each site: of the last, the
    visible sites are gathered.
    """
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, SparseTensor))
    forms = {}
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, SparseTensor):
            if value is not x:
                check_same_sites(x, value, name)
            forms[key] = "rows", value.features
        elif isinstance(value, Tensor) and value.ndim:
            forms[key] = _form(value if name != "copy_" else value.to(x.device), x, name)
            wide = forms[key][1].shape
            pairs = zip(wide[len(wide) + 1 - x.features.ndim :], x.features.shape[1:], strict=True)
            if any(a != b and 1 not in (a, b) for a, b in pairs):
                _refuse_shape(value, x, name)
        else:
            if isinstance(value, Tensor) and value.device.type != "cpu" and name != "copy_":
                check_device(value, "a number", x)
            forms[key] = "", _number(value, name)
    layout, per_image = x.layout, x.layout.rows_per_image
    split = any(kind == "image" for kind, _ in forms.values()) and per_image is not None

    def placed(kind: str, value: Any) -> Any:
        if kind == "image":  # `(B, *channels)`
            return value.unsqueeze(1) if split else value.index_select(0, layout.row_image())
        if kind == "rows" and split:
            return value.reshape(layout.batch, per_image, *value.shape[1:])
        return value

    ready = {key: placed(*form) for key, form in forms.items()}
    out = function(*(ready[key] for key in range(len(args))), **{key: ready[key] for key in kwargs})
    if name.endswith("_"):
        return x
    return packed(out.flatten(0, 1) if split else out, layout, x.channels_last)


def _number(value: Any, name: str) -> Any:
    """Return an operand that is no tensor; one of numpy as a number of Python."""
    if isinstance(value, (int, float, str, type(None))) or not hasattr(value, "__array_interface__"):
        return value
    if value.ndim:
        refuse(name, f"an operand is a numpy array {value.shape}", "torch.as_tensor makes it a tensor")
    return value.item()


def _form(value: Tensor, x: SparseTensor, name: str) -> tuple[str, Tensor]:
    """Return how an ordinary tensor meets the rows of `x`, and its values.

    That is `"channels"` with `(*channels)`, `"image"` with `(B, *channels)`, or `"rows"` with `(rows, *channels)`.
    """
    if value.device != x.device:
        check_device(value, kind(value), x)
    layout, (_, *sizes) = x.layout, x.features.shape
    batch = layout.batch
    # The common case of squeeze and excite, (B, C, 1, 1), without what follows, which takes 3 us.
    if not x.channels_last and value.shape == (batch, *sizes, *(1,) * layout.ndim):
        return ("channels", value.reshape(sizes)) if batch == 1 else ("image", value.reshape(batch, *sizes))
    shape, (channels, spatial) = x.shape, axes(x)
    if value.ndim > len(shape):
        refuse(name, f"a tensor {tuple(value.shape)} has more dimensions than x, {tuple(shape)}", "reshape one of them")
    given = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
    if any(given[d] not in (1, shape[d]) for d in (0, *spatial)):
        _refuse_shape(value, x, name)
    value = value.reshape(given)
    for d in spatial:  # An expanded tensor repeats its values over space.
        if given[d] > 1 and value.stride(d) == 0:
            value = value.narrow(d, 0, 1)
    wide = [value.shape[d] for d in channels]
    if all(value.shape[d] == 1 for d in spatial):
        return ("channels", value.reshape(wide)) if value.shape[0] == 1 else ("image", value.reshape(batch, *wide))
    if x.channels_last:
        value = value.movedim(tuple(channels), tuple(range(1, 1 + len(channels))))
    images = value.expand(batch, *wide, *x.layout.shape).reshape(batch, math.prod(wide), *x.layout.shape)
    return "rows", gather_rows(images, x.layout).reshape(x.layout.rows, *wide)


def _refuse_shape(value: Tensor, x: SparseTensor, name: str) -> NoReturn:
    refuse(name, f"a tensor {tuple(value.shape)} does not broadcast to x, {tuple(x.shape)}",
           "give it sizes of 1 or those of x, for example (C, 1, 1) for a value for each channel")  # fmt: skip


def _nary(name: str) -> Handler:
    function = _implementation(name)

    def handler(*args: Any, **kwargs: Any) -> SparseTensor:
        if len(args) == 2 and not kwargs:
            x, y = args
            other = type(y)
            if type(x) is SparseTensor:
                if other is float or other is int:
                    out = function(x.features, y)
                    return x if out is x.features else like(x, out)
                if other is SparseTensor and x.layout is y.layout and x.channels_last is y.channels_last:
                    a, b = x.features, y.features
                    if a.ndim == b.ndim:
                        out = function(a, b)
                        return x if out is a else like(x, out)
        if name == "where" and len(args) + len(kwargs) == 1:
            refuse(name, "its answer would be places of single elements", "give it the values of both cases")
        if name.endswith("_") and not isinstance(args[0], SparseTensor):
            refuse(
                name, f"it would write visible sites into {kind(args[0])}", "use the function that returns a new tensor"
            )
        return combine(function, name, args, kwargs)

    handler.__name__ = name
    return handler


HANDLER_OF: dict[str, Handler] = {}
for _name in (*ACTIVATIONS, *UNARY, "zero_"):
    HANDLER_OF[_name] = answers(_name, meaning="at every visible site", inplace=_unary)(_unary(_name))
for _name in NARY:
    HANDLER_OF[_name] = answers(
        _name,
        meaning="at every visible site, with numbers, SparseTensors of the same sites, and tensors that broadcast: a "
        "value for each channel, for each image, or for each site, of which the visible ones are gathered",
        inplace=_nary,
    )(_nary(_name))


for _name in ("uniform_", "normal_", "bernoulli_", "exponential_", "bernoulli"):
    answers(_name, meaning="draws a number for every element of visible sites")(_unary(_name))


def _where(x: Any, condition: Any, other: Any) -> SparseTensor:
    return HANDLER_OF["where"](condition, x, other)


HANDLERS[Tensor.where] = _where
SparseTensor.where = _where  # type: ignore[attr-defined]


def _reversed(handler: Handler) -> Handler:
    return lambda x, y: handler(y, x)


for _operator, _name in {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "pow", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}.items():  # fmt: skip
    put(f"__{_operator}__", HANDLER_OF[_name])
    put(f"__r{_operator}__", _reversed(HANDLER_OF[_name]))
    put(f"__i{_operator}__", _nary(f"{_name}_"))
for _operator in ("lt", "le", "gt", "ge"):
    put(f"__{_operator}__", HANDLER_OF[_operator])


def _equality(handler: Handler) -> Handler:
    def compare(x: Any, y: Any) -> Any:
        return handler(x, y) if isinstance(y, (SparseTensor, Tensor, int, float)) else NotImplemented

    return compare


for _operator in ("eq", "ne"):
    put(f"__{_operator}__", _equality(HANDLER_OF[_operator]))
put("__neg__", HANDLER_OF["neg"])
put("__abs__", HANDLER_OF["abs"])
put("__invert__", HANDLER_OF["bitwise_not"])
put("__pos__", HANDLER_OF["positive"])


@answers("prelu", meaning="at every visible site, with one slope or one for each channel")
def prelu(x: SparseTensor, weight: Tensor) -> SparseTensor:
    if weight.numel() != 1 and (x.channels_last or x.features.ndim != 2):
        refuse("prelu", f"x is {tuple(x.shape)}: its slopes belong to dimension 1", "bring x to (B, C, *spatial) first")
    if weight.numel() == 1:
        check_device(weight, "weight", x)
    else:
        check_vector(weight, "weight", x.features.shape[1], x)
    return like(x, F.prelu(x.features, weight))


def _dropout(name: str) -> Handler:
    function = getattr(F, name)

    def handler(x: SparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> SparseTensor:
        if not training or p == 0.0:
            return x
        out = function(x.features, p, True, inplace)
        return x if inplace else like(x, out)

    return handler


for _name in ("dropout", "alpha_dropout"):
    answers(_name, meaning="drops elements of visible sites at random")(_dropout(_name))


@answers("dropout1d", "dropout2d", "dropout3d", "feature_dropout", meaning="drops channels of an image at random")
def dropout_channels(x: SparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> SparseTensor:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}: expected a probability, 0 to 1")
    if not training or p == 0.0:
        return x
    if x.channels_last:
        refuse("dropout2d", f"x is {tuple(x.shape)}, whose channels are last", "bring it to (B, C, *spatial) first")
    shape = x.layout.batch, *x.features.shape[1:], *([1] * x.layout.ndim)
    noise = x.features.new_empty(shape).bernoulli_(1 - p)
    return (x.mul_ if inplace else x.mul)(noise.div_(1 - p) if p < 1 else noise)
