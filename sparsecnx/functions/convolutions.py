"""Convolutions, and linear maps of channels."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx import ops
from sparsecnx.backends.dispatch import Operator
from sparsecnx.backends.selection import selected
from sparsecnx.common.memory import check_memory
from sparsecnx.common.once import remember
from sparsecnx.functions.table import Handler, answers, axes, channels_first, check_same_sites, kind, like, refuse
from sparsecnx.functions.windows import TAKE_PADDING, check_axes, coarsened, per_axis, plan, refined, unpadded
from sparsecnx.geometry.layout import Layout
from sparsecnx.ops import convolution
from sparsecnx.ops.checks import check_device, check_same_dtype
from sparsecnx.ops.convolution import products
from sparsecnx.ops.convolution.window import Window
from sparsecnx.tensor import SparseTensor, packed

_is_compiling = torch.compiler.is_compiling


class Prepared(NamedTuple):
    """Hold what does not change between the calls of one layer, checked at its first call.

    Attributes:
        operator: the one that `ops.conv` or `ops.conv_transpose` chose.
        product: its function where that is one matrix product; None for others.
        window: its argument.
        other: returns the layout of the output; None where that is the layout of the input.
    """

    operator: Operator
    product: Callable[..., Tensor] | None
    window: Window
    other: Callable[[Layout, tuple[int, ...]], Layout] | None

    def __call__(self, x: SparseTensor, weight: Tensor, bias: Tensor | None, groups: int) -> SparseTensor:
        layout = x.layout if self.other is None else self.other(x.layout, self.window.stride)
        runs = self.operator if self.product is None or selected() != "auto" else self.product
        return packed(runs(x, weight, bias, self.window, groups), layout)


_prepared: dict[Any, Prepared] = {}


def _convolution(name: str) -> Handler:
    dense = getattr(F, name)

    def handler(
        input: Any,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        x, extra = unpadded(input, name)
        features, layout = x.features, x.layout
        key = None
        # Checks at every call took 13 of 31 us (benchmarks/overhead.py, 2026-11-28).
        if extra is None and type(stride) is type(padding) is type(dilation) is tuple and not _is_compiling():
            shapes = weight.shape, None if bias is None else bias.shape, features.shape[1], layout.tile, layout.shape
            key = name, shapes, features.dtype, stride, padding, dilation, groups
            try:
                prepared = _prepared.get(key)
            except TypeError:  # Sizes that torch traces have no hash.
                key = prepared = None
            if prepared is not None and _plain(features, weight, bias):
                return prepared(x, weight, bias, groups)
        window = plan(name, x, tuple(weight.shape[2:]), stride, padding, dilation, extra)
        if weight.shape[1] * groups != features.shape[1]:
            raise ValueError(
                f"x has {features.shape[1]} channels: weight {tuple(weight.shape)} and groups {groups} take "
                f"{weight.shape[1] * groups}; if the network joins only what isinstance(x, torch.Tensor) says is one, "
                "call it with x.as_tensor()"
            )
        if window.dense:
            check_device(weight, "weight", x)
            border = [side for pair in zip(window.before[::-1], window.after[::-1], strict=True) for side in pair]
            return dense(F.pad(x.dense(), border), weight, bias, window.stride, 0, window.dilation, groups)
        result = ops.conv(x, weight, bias, window.stride, window.before, window.dilation, groups)
        if key is not None and not 1 < groups == features.shape[1]:  # Depthwise ones check little.
            inner = Window(window.kernel, window.stride, window.before, window.dilation)
            is_product = products.applies(layout, inner)
            runs = convolution.patchify_operator if is_product else convolution.operator
            other = coarsened if max(window.stride) > 1 else None
            remember(_prepared, key, Prepared(runs, products.conv if is_product else None, inner, other))
        return result

    return handler


def _plain(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether nothing is to cast, and devices agree; raise RuntimeError where memory was freed."""
    device = features.device
    if weight.dtype is not features.dtype or weight.device != device or torch.is_autocast_enabled(device.type):
        return False
    if bias is None:
        check_memory(x=features, weight=weight)
        return True
    check_memory(x=features, weight=weight, bias=bias)
    return bias.dtype is features.dtype and bias.device == device


for _name in ("conv1d", "conv2d", "conv3d"):
    _handler = answers(
        _name,
        meaning="of the zero-filled input, masked after; any groups, dilation, stride per axis, and padding that gives "
        "extent / stride sites",
        limits="stride divides the tile; one site left per axis is an ordinary tensor",
    )(_convolution(_name))
    TAKE_PADDING[getattr(F, _name)] = _handler


def _transposed(name: str) -> Handler:
    def handler(
        input: Any,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> SparseTensor:
        x = channels_first(input, name)
        features, layout = x.features, x.layout
        key = None
        tuples = type(stride) is type(padding) is type(output_padding) is type(dilation) is tuple
        if tuples and not _is_compiling():
            shapes = weight.shape, None if bias is None else bias.shape, features.shape[1], layout.tile
            key = name, shapes, features.dtype, stride, padding, output_padding, dilation, groups
            try:
                prepared = _prepared.get(key)
            except TypeError:
                key = prepared = None
            if prepared is not None and _plain(features, weight, bias):
                return prepared(x, weight, bias, groups)
        ndim, kernel = layout.ndim, tuple(weight.shape[2:])
        check_axes(name, layout, kernel)
        strides, before = per_axis(stride, ndim), per_axis(padding, ndim)
        after, dilations = per_axis(output_padding, ndim), per_axis(dilation, ndim)
        for k, s, p, more, d in zip(kernel, strides, before, after, dilations, strict=True):
            if d * (k - 1) + 1 - 2 * p + more != s:
                raise ValueError(
                    f"{name}: kernel {kernel}, stride {strides}, padding {before}, output_padding {after} and dilation "
                    f"{dilations} do not give extent * stride sites: dilation * (kernel - 1) + 1 - 2 * padding + "
                    "output_padding must be the stride"
                )
        result = ops.conv_transpose(x, weight, bias, strides, before, dilations, groups)
        if key is not None:
            inner = Window(kernel, strides, before, dilations)
            is_product = inner.partitions and products.applies(result.layout, inner)
            runs = convolution.unpatchify_operator if is_product else convolution.transposed_operator
            other = refined if max(strides) > 1 else None
            remember(_prepared, key, Prepared(runs, products.conv_transpose if is_product else None, inner, other))
        return result

    return handler


for _name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    answers(_name, meaning="of the zero-filled input, masked after", limits="the output has extent * stride sites")(
        _transposed(_name)
    )


def _check_factor(value: Tensor, name: str, x: SparseTensor) -> None:
    """Raise unless `value` is on the device of `x`, and of its dtype where autocast does not cast both."""
    check_device(value, name, x)
    where = x.device.type
    if value.dtype != x.dtype and (where == "meta" or not torch.is_autocast_enabled(where)):
        check_same_dtype(x, name, value)


@answers("linear", meaning="over channels that are last", limits="x is channels-last")
def linear(input: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    if not isinstance(input, SparseTensor):
        refuse("linear", "its weight is a SparseTensor", "only the input can be one")
    if not input.channels_last:
        refuse("linear", f"x is {tuple(input.shape)}, whose last dimension is space", "permute the channels to the end")
    channels = input.features.shape[-1]
    if weight.shape[-1:] != (channels,):
        raise ValueError(f"weight is {tuple(weight.shape)}: x has {channels} channels, expected (C_out, {channels})")
    _check_factor(weight, "weight", input)
    return like(input, products.linear(input.features, weight, bias))


@answers("matmul", "__matmul__", meaning="channels that are last times a matrix", limits="x is channels-last")
def matmul(input: Any, other: Any) -> SparseTensor:
    if (
        not isinstance(input, SparseTensor)
        or not input.channels_last
        or not isinstance(other, Tensor)
        or other.ndim > 2
    ):
        refuse("matmul", "sites would be multiplied with sites", "x is channels-last, and the other a matrix (C, C')")
    channels = input.features.shape[-1]
    if other.shape[:1] != (channels,):
        raise ValueError(f"other is {tuple(other.shape)}: x has {channels} channels, expected ({channels}, C_out)")
    _check_factor(other, "other", input)
    if other.ndim == 2:
        return like(input, products.linear(input.features, other.t()))
    return like(input, torch.matmul(input.features, other))


@answers("einsum", meaning="products and sums over channels", limits="batch and space of x are in the output, in order")
def einsum(equation: str, *operands: Any) -> SparseTensor:
    if not isinstance(equation, str):
        refuse("einsum", "its equation is given as lists", "write it as a string")
    values = tuple(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    terms, _, output = equation.replace(" ", "").partition("->")
    first, x = next((place, value) for place, value in enumerate(values) if isinstance(value, SparseTensor))
    free = (letter for letter in string.ascii_letters if letter not in equation)
    rows, places, given = next(free), "", []
    rest = "".join(next(free) for _ in range(x.ndim - len(terms.split(",")[first].replace("...", ""))))
    for term, value in zip(terms.split(","), values, strict=True):
        if not isinstance(value, SparseTensor):
            check_device(value, kind(value), x)
            given.append((term, value))
            continue
        if value is not x:
            check_same_sites(x, value, "einsum")
        letters = term.replace("...", rest)
        if len(letters) != x.ndim:
            refuse("einsum", f"{term!r} stands for {tuple(value.shape)}", "it takes a letter for each dimension")
        channels = "".join(letters[d] for d in axes(value)[0])
        found = "".join(letter for letter in letters if letter not in channels)
        if len(found) != 1 + x.layout.ndim or places not in ("", found):
            refuse("einsum", f"{equation!r} has other letters for batch and space", "give those the same letters")
        places = found
        given.append((rows + channels, value.features))
    output = output.replace("...", rest)
    for term, value in given:
        if isinstance(value, Tensor) and ("..." in term or set(term) & set(places)):
            refuse("einsum", f"{term!r} shares batch or space with x", "multiply x with that tensor first")
    channels = "".join(letter for letter in output if letter not in places)
    last = output == places + channels and bool(channels)
    if not last and output != places[0] + channels + places[1:]:
        refuse("einsum", f"{equation!r} sums over batch or space, or moves them",
               "sum over space with x.sum((2, 3)), of visible sites")  # fmt: skip
    inputs = ",".join(term for term, _ in given)
    features = torch.einsum(f"{inputs}->{rows}{channels}", *(value for _, value in given))
    return packed(features, x.layout, last)
