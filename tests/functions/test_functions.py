"""Every function of the table against its dense counterpart, masked afterwards, in float64 with gradients."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import draw_mask, make_layout
from torch import Tensor, nn

from sparsecnx import SparseTensor
from sparsecnx.common import once
from sparsecnx.functions import convolutions, windows
from sparsecnx.functions.elementwise import ACTIVATIONS, UNARY
from sparsecnx.geometry.packing import gather_rows

BATCH, CHANNELS, GRID, TILE = 3, 4, (2, 3), 4
SPACE = (GRID[0] * TILE, GRID[1] * TILE)
each_mask = pytest.mark.parametrize("counts", ["random counts", "equal counts"])


def values(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(counts: str = "random counts") -> SparseTensor:
    """Return three images of which some are visible; with random counts each has another share."""
    layout = make_layout(draw_mask(counts, BATCH, GRID, seed=2), TILE)
    assert 0 not in layout.row_splits.diff() and (layout.rows_per_image is None) == (counts == "random counts")
    return SparseTensor(values(layout.rows, CHANNELS, seed=1).requires_grad_(), layout)


class AlsoSparse:
    """An operand that is sparse where the input is: `dense` at the sites of the input."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def beside(self, x: Any) -> Any:
        if isinstance(x, SparseTensor):
            return SparseTensor(gather_rows(self.dense, x.layout), x.layout)
        return self.dense


OTHER = AlsoSparse(values(BATCH, CHANNELS, *SPACE))
PER_CHANNEL, PER_IMAGE = values(CHANNELS, 1, 1), values(BATCH, CHANNELS, 1, 1)
PER_SITE = values(1, 1, *SPACE)
W1, W3, GROUPED = values(6, CHANNELS, 1, 1), values(6, CHANNELS, 3, 3), values(6, 2, 3, 3)
DEPTHWISE, UP, BIAS = values(CHANNELS, 1, 3, 3), values(CHANNELS, 6, 2, 2), values(6)
MATRIX, VECTOR = values(6, CHANNELS), values(CHANNELS)
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)
CONDITION = values(BATCH, CHANNELS, *SPACE) > 0


def last(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function between channels last, and back."""
    return lambda x: function(x.permute(LAST)).permute(FIRST)


def positive(x: Any) -> Any:
    return torch.sigmoid(x)


def on(home: Any, name: str, x: Any) -> Any:
    return getattr(home, name)(x)


def of_positive(home: Any, name: str, x: Any) -> Any:
    return getattr(home, name)(positive(x))


def truth(home: Any, name: str, x: Any) -> Any:
    return getattr(home, name)(x).double()


def compared(home: Any, name: str, x: Any) -> Any:
    return getattr(home, name)(x, 0.2) * x


def joined(home: Any, name: str, x: Any) -> Any:
    return getattr(home, name)(x > 0, x < 1) * x


def along(name: str, x: Any) -> Any:
    found = getattr(torch, name)(x, dim=1)
    found = found[0] if isinstance(found, tuple) else found  # values and indices
    return found if found.ndim == x.ndim else found.unsqueeze(1)


# Functions of sites and of the sites around them: dense on the zero-filled tensor, then masked.
AT_SITES: dict[str, Callable[[Any], Any]] = {
    **{name: partial(on, F, name) for name in ACTIVATIONS if name not in ("threshold", "rrelu")},
    **{name: partial(of_positive, torch, name) for name in UNARY
       if not name.startswith(("is", "logical", "bitwise", "signbit"))},
    **{name: partial(truth, torch, name) for name in UNARY if name.startswith(("is", "logical", "signbit"))},
    **{name: partial(compared, torch, name) for name in ("greater", "greater_equal", "less", "less_equal",
                                                       "not_equal")},
    "arctan2": lambda x: torch.arctan2(x, OTHER.beside(x)),
    "logaddexp": lambda x: torch.logaddexp(x, OTHER.beside(x)),
    "logaddexp2": lambda x: torch.logaddexp2(x, OTHER.beside(x)),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor([2]).view(1, 1, 1)),
    "nextafter": lambda x: torch.nextafter(x.detach(), OTHER.beside(x)) * x,
    "isclose": lambda x: torch.isclose(x, x + 1e-9) * x,
    "fill": lambda x: torch.fill(x, 2.0) + x.clone().fill_(3.0),
    "copy_": lambda x: x.clone().copy_(OTHER.beside(x)) * x.clone().copy_(PER_IMAGE),
    "zero_": lambda x: x.clone().zero_() + x,
    "uniform_": lambda x: x.clone().uniform_(1, 1 + 1e-15).round() * x,
    "normal_": lambda x: x.clone().normal_(2, 0) * x,
    "exponential_": lambda x: 0 * x.clone().exponential_() + x,
    "bernoulli_": lambda x: x.clone().bernoulli_(1.0) * x,
    "bernoulli": lambda x: torch.bernoulli(torch.ones_like(x)) * x,
    "bitwise_not": lambda x: torch.bitwise_not(x > 0).double(),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.3, training=False),
    "add sparse": lambda x: x + OTHER.beside(x),
    "add number": lambda x: 1.5 + x,
    "add twice": lambda x: torch.add(x, OTHER.beside(x), alpha=3),
    "sub channel": lambda x: PER_CHANNEL - x,
    "subtract": lambda x: torch.subtract(x, 2),
    "rsub": lambda x: torch.rsub(x, PER_IMAGE),
    "mul image": lambda x: x * PER_IMAGE,
    "mul scalar of each image": lambda x: x * PER_IMAGE[:, :1],
    "mul site": lambda x: x * PER_SITE,
    "mul one channel": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "mul of channels last": last(lambda x: x * VECTOR),
    "mul of an image, channels last": last(lambda x: PER_IMAGE.permute(LAST) * x),
    "mul expanded": lambda x: x * PER_IMAGE.expand_as(x),
    "multiply": lambda x: torch.multiply(x, 0.5),
    "div": lambda x: PER_CHANNEL / positive(x),
    "divide": lambda x: torch.divide(x, 3),
    "true_divide": lambda x: torch.true_divide(x, OTHER.beside(x)),
    "floor_divide": lambda x: (x.detach() // 0.3) * x,
    "remainder": lambda x: x % 0.3,
    "fmod": lambda x: torch.fmod(x, 0.3),
    "pow": lambda x: x**2 + 2 ** x,
    "float_power": lambda x: torch.float_power(positive(x), 1.5),
    "maximum": lambda x: torch.maximum(x, OTHER.beside(x)),
    "minimum": lambda x: torch.minimum(x, PER_IMAGE),
    "max of two": lambda x: torch.max(x, OTHER.beside(x)),
    "min of two": lambda x: torch.min(x, OTHER.beside(x)),
    "fmax": lambda x: torch.fmax(x, OTHER.beside(x)),
    "fmin": lambda x: torch.fmin(x, OTHER.beside(x)),
    "atan2": lambda x: torch.atan2(x, OTHER.beside(x)),
    "hypot": lambda x: torch.hypot(x, OTHER.beside(x)),
    "copysign": lambda x: torch.copysign(x, OTHER.beside(x)),
    **{name: partial(compared, torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"logical_{name}": partial(joined, torch, f"logical_{name}") for name in ("and", "or", "xor")},
    **{f"bitwise_{name}": partial(joined, torch, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "xlogy": lambda x: torch.xlogy(x, OTHER.beside(x).abs() + 1),
    "heaviside": lambda x: torch.heaviside(x.detach(), PER_CHANNEL) * x,
    "addcmul": lambda x: torch.addcmul(PER_CHANNEL, PER_IMAGE, x, value=2),
    "addcdiv": lambda x: torch.addcdiv(x, PER_IMAGE, positive(x)),
    "lerp": lambda x: torch.lerp(x, OTHER.beside(x), 0.3),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clip": lambda x: torch.clip(x, max=PER_CHANNEL),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: torch.clamp_max(x, 0.1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x) + torch.where(CONDITION, x, PER_IMAGE),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.25),
    "prelu": lambda x: F.prelu(x, VECTOR),
    "softmax": lambda x: torch.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "softmin": lambda x: F.softmin(x, dim=-3),
    **{name: partial(along, name) for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "mode",
                                              "median", "nanmedian", "nansum", "nanmean", "diff")},
    "softmax in another dtype": lambda x: torch.softmax(x.detach().float(), 1, torch.float64) + F.softmax(x, 1),
    "argsort": lambda x: x.argsort(1, descending=True) * x,
    "count_nonzero": lambda x: (x > 0).count_nonzero(dim=1).unsqueeze(1) * x,
    "topk": lambda x: x.topk(2, 1).values * x.topk(k=2, dim=1)[1],
    "kthvalue": lambda x: x.kthvalue(2, dim=1, keepdim=True).values * x,
    "gumbel_softmax": lambda x: F.gumbel_softmax(1e9 * x.detach(), hard=True, dim=1) * x,
    "roll": lambda x: x.roll(1, 1) + torch.roll(x, shifts=2, dims=1),
    "einsum": lambda x: torch.einsum("bchw,oc->bohw", x, MATRIX) + torch.einsum("nc...,oc -> no...", x, MATRIX),
    "einsum of two": lambda x: torch.einsum("bchw,bchw->bhw", x, OTHER.beside(x)).unsqueeze(1),
    "einsum of channels last": last(lambda x: torch.einsum("oc,...c->...o", MATRIX, x)),
    "batch_norm in the order of torch": lambda x: torch.batch_norm(
        x, VECTOR, VECTOR + 1, VECTOR.square(), VECTOR.exp(), False, 0.1, 1e-3, True
    ),
    "native_channel_shuffle": lambda x: torch.native_channel_shuffle(x.detach(), 2) * x,
    "short": lambda x: x.short() * x,
    "type_as of another": lambda x: x + torch.ones(1).type_as(x),
    "glu": lambda x: F.glu(x, dim=1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "conv2d": lambda x: F.conv2d(x, W3, BIAS, padding=1),
    "conv2d same": lambda x: F.conv2d(x, values(6, CHANNELS, 2, 4), BIAS, padding="same"),
    "conv2d 1x1": lambda x: F.conv2d(x, W1),
    "conv2d patchify": lambda x: F.conv2d(x, values(6, CHANNELS, 2, 2), BIAS, 2),
    "conv2d stride per axis": lambda x: F.conv2d(x, W3, BIAS, (2, 1), 1),
    "conv2d of one kernel for all channels": lambda x: F.conv2d(x, DEPTHWISE[:1].expand(6, CHANNELS, 3, 3), padding=1),
    "conv2d with numbers of NumPy": lambda x: F.conv2d(x, W3, BIAS, numpy.int64(2), padding=numpy.int64(1)),
    "conv2d grouped": lambda x: F.conv2d(x, GROUPED, BIAS, 2, 1, 1, 2),
    "conv2d dilated": lambda x: F.conv2d(x, W3, BIAS, padding=2, dilation=2),
    "conv2d depthwise": lambda x: F.conv2d(x, DEPTHWISE, None, 2, 1, 1, CHANNELS),
    "conv2d after pad": lambda x: F.conv2d(F.pad(x, (0, 1, 1, 0)), W3, BIAS, 2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, UP, BIAS, 2),
    "conv_transpose2d of one kernel": lambda x: F.conv_transpose2d(x, DEPTHWISE.expand(-1, 6, -1, -1), None, 1, 1),
    "conv_transpose2d 4x4": lambda x: F.conv_transpose2d(x, values(CHANNELS, 6, 4, 4), None, 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d 3x3": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d without pad": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "avg_pool2d rounded up": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "avg_pool2d same": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool2d after pad": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2),
    "avg_pool2d after pad on one side": lambda x: F.avg_pool2d(F.pad(x, (2, 0, 0, 2)), 3, 1),
    "avg_pool2d divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive_avg_pool2d divisor": lambda x: F.adaptive_avg_pool2d(x, (SPACE[0] // 2, SPACE[1] // 2)),
    "adaptive_avg_pool2d extent": lambda x: F.adaptive_avg_pool2d(x, (None, SPACE[1])),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, 2),
    "lp_pool2d rounded up": lambda x: F.lp_pool2d(x, 4.0, 3, 2, ceil_mode=True),
    "lp_pool2d of the largest": lambda x: F.lp_pool2d(x, math.inf, 2),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad nothing": lambda x: F.pad(x, (0, 0, 0, 0), mode="replicate"),
    "linear": last(lambda x: F.linear(x, MATRIX, BIAS)),
    "matmul": last(lambda x: torch.matmul(x, MATRIX.T)),
    "__matmul__": last(lambda x: x @ MATRIX.T),
    "layer_norm": last(lambda x: F.layer_norm(x, (CHANNELS,), VECTOR, VECTOR)),
    "layer_norm without parameters": last(lambda x: F.layer_norm(x, (CHANNELS,))),
    "rms_norm": last(lambda x: F.rms_norm(x, (CHANNELS,), VECTOR)),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "mean channels": lambda x: x.mean(1, keepdim=True),
    "mean unsqueezed": lambda x: x.mean(dim=1).unsqueeze(1),
    "sum channels": lambda x: torch.sum(x, dim=1, keepdim=True),
    "amax channels": lambda x: torch.cat([x.amax(1, keepdim=True), x.max(1, keepdim=True)[0]], 1),
    "max channels": lambda x: x.max(dim=1).values.unsqueeze(1),
    "amin channels": lambda x: torch.cat([x.amin(1, keepdim=True), x.min(1, keepdim=True).values], 1),
    "var channels": lambda x: x.var(1, keepdim=True),
    "std channels": lambda x: x.std(1, unbiased=False, keepdim=True),
    "norm channels": lambda x: x.norm(dim=1, keepdim=True),
    "linalg.vector_norm channels": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "argmax": lambda x: x.argmax(1, keepdim=True) * x,
    "argmin": lambda x: x.argmin(1, keepdim=True) * x,
    "logsumexp": lambda x: torch.logsumexp(x, 1, keepdim=True),
    "prod": lambda x: x.prod(1, keepdim=True),
    "all": lambda x: (x > 0).all(1, keepdim=True) * x,
    "any": lambda x: (x > 0).any(1, keepdim=True) * x,
    "permute": lambda x: x.permute(LAST).permute(0, -1, 1, 2),
    "transpose": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "swapaxes": lambda x: torch.swapaxes(x.reshape(BATCH, 2, 2, *SPACE), 1, 2).flatten(1, 2),
    "swapdims": lambda x: torch.swapdims(x.reshape(BATCH, 2, 2, *SPACE), 1, 2).flatten(1, 2),
    "movedim": lambda x: x.movedim(1, -1).movedim(-1, 1),
    "moveaxis": lambda x: torch.moveaxis(torch.moveaxis(x, 1, 3), 3, 1),
    "reshape": lambda x: x.reshape(BATCH, -1, 2, *SPACE).sum(1),
    "view": lambda x: x.view(BATCH, 2, CHANNELS // 2, *SPACE).amax(2),
    "view_as": lambda x: x.unflatten(1, (2, 2)).view_as(x),
    "reshape_as": lambda x: x.unflatten(1, (2, 2)).reshape_as(x),
    "flatten": lambda x: x.permute(LAST).unflatten(-1, (2, 2)).flatten(-2).permute(FIRST),
    "unflatten": lambda x: x.unflatten(1, (2, 2)).sum(2),
    "unsqueeze": lambda x: x.unsqueeze(2).mul(values(3, 1, 1)).flatten(1, 2),
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cat": lambda x: torch.cat([x, OTHER.beside(x), PER_SITE.expand(BATCH, 2, *SPACE)], 1),
    "cat with images": lambda x: torch.cat([PER_IMAGE.expand(-1, -1, *SPACE), x], dim=1),
    "concat": lambda x: torch.concat((x, x), -3),
    "concatenate": lambda x: torch.concatenate((x, x), 1),
    "stack": lambda x: torch.stack([x, 2 * x], 1).sum(1),
    "chunk": lambda x: torch.mul(*x.chunk(2, 1)),
    "split": lambda x: torch.cat(torch.split(x, (1, 3), dim=1)[::-1], 1),
    "split_with_sizes": lambda x: torch.cat(x.split_with_sizes((1, 3), 1)[::-1], 1),
    "tensor_split": lambda x: x.tensor_split(2, 1)[1],
    "unbind": lambda x: x.unbind(1)[2].unsqueeze(1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: x.select(1, 3).unsqueeze(1),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0, 2])),
    "flip": lambda x: torch.flip(x, [1]),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "__getitem__ slice": lambda x: x[:, 1:3],
    "__getitem__ list": lambda x: x[:, [2, 0], ...],
    "__getitem__ tensor": lambda x: x[:, torch.tensor([True, False, True, False]), :, :],
    "__getitem__ sites": lambda x: x[:, :, ::2, ::2],
    "__getitem__ last": last(lambda x: x[..., 1:]),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 4),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate by 3": lambda x: F.interpolate(x, size=(3 * SPACE[0], 3 * SPACE[1])),
    "interpolate to half": lambda x: F.interpolate(x, scale_factor=0.5),
    "interpolate bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "interpolate bilinear corners": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "interpolate bicubic": lambda x: F.interpolate(x, size=(12, 18), mode="bicubic"),
    "dropout": lambda x: F.dropout(x, 0.3, training=False) + F.dropout(x, 1.0),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=False),
    "dropout2d": lambda x: F.dropout2d(x, 0.3, training=False) + F.dropout2d(x, 1.0),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.3, False),
    "float": lambda x: x.float().double(),
    "half": lambda x: x.half().double(),
    "bfloat16": lambda x: x.bfloat16().double(),
    "to": lambda x: x.to(torch.float32, memory_format=torch.channels_last).to(x),
    "type": lambda x: x.type(torch.float32).type(torch.float64),
    "type_as": lambda x: x.type_as(VECTOR.float()).type_as(VECTOR),
    "int": lambda x: x.int() * x,
    "long": lambda x: x.long() * x,
    "bool": lambda x: x.bool() * x,
    "cpu": lambda x: x.cpu(),
    "detach": lambda x: x.detach() * x,
    "clone": lambda x: x.clone(memory_format=torch.preserve_format),
    "zeros_like": lambda x: torch.zeros_like(x) + x,
    "ones_like": lambda x: torch.ones_like(x) * x,
    "full_like": lambda x: torch.full_like(x, 3.0) * x,
    "empty_like": lambda x: torch.empty_like(x).fill_(2.0) * x if isinstance(x, Tensor) else 2.0 * x,
    "rand_like": lambda x: 0 * torch.rand_like(x) + x,
    "randn_like": lambda x: 0 * torch.randn_like(x) + x,
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "where method": lambda x: (x > 0).where(x > -1, x > 1) * x + x.where(x > 0, PER_CHANNEL),
    "where by name": lambda x: torch.where(condition=x > 0, input=x, other=2 * x),
    "mul numpy": lambda x: numpy.float64(2) * x - numpy.int64(1) / positive(x),
    "__getitem__ numpy": lambda x: x[:, numpy.array([0, 3])],
    "permute by name": lambda x: torch.permute(x, dims=LAST).permute(dims=FIRST),
    "reshape by name": lambda x: torch.reshape(x, shape=(BATCH, 2, 2, *SPACE)).view(size=(BATCH, 4, *SPACE)),
    "flip by name": lambda x: torch.flip(x, dims=[1]).expand(size=x.shape),
    "split by name": lambda x: x.split(split_size=2, dim=1)[1] + torch.chunk(input=x, chunks=2, dim=1)[0],
    "split of a tensor by name": lambda x: torch.split(tensor=x, split_size_or_sections=2, dim=1)[0],
    "cat by name": lambda x: torch.cat(tensors=[x, torch.relu(input=x)], axis=1),
    "mean by name": lambda x: x.mean(axis=1, keepdims=True) + torch.mean(input=x, dim=1, keepdim=True),
    "std by name": lambda x: torch.std(x, axis=1, keepdim=True),
    "swapaxes by name": lambda x: x.unflatten(1, (2, 2)).swapaxes(axis0=1, axis1=2).flatten(1, 2),
    "dropout by name": lambda x: torch.dropout(x, 0.3, train=False),
    "requires_grad_": lambda x: x + x.detach().requires_grad_(),
}  # fmt: skip

# Statistics of each image over its visible sites: of a dense image `(1, C, sites, 1)` that has no others.
OF_IMAGES: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: torch.mean(x, [-1, -2], keepdim=True),
    "mean of everything": lambda x: x.mean((1, 2, 3), keepdim=True),
    "sum": lambda x: x.sum(dim=(2, 3), keepdim=True),
    "sum of channels too": lambda x: x.sum((1, 2, 3)),
    "amax": lambda x: torch.amax(x, (2, 3)),
    "amin": lambda x: x.amin((2, 3), keepdim=True),
    "amax of zero": lambda x: (x - x.detach().amax((2, 3), keepdim=True)).amax((2, 3)),
    "amin of zero": lambda x: (x - x.detach().amin((2, 3), keepdim=True)).amin((2, 3)),
    "var": lambda x: x.var((2, 3)),
    "var keepdim": lambda x: torch.var(x, (1, 2, 3), correction=0, keepdim=True),
    "std": lambda x: torch.std(x, (2, 3), unbiased=False),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, (2, 3)), 1),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, dim=(2, 3), correction=0), 1),
    "std of what is constant": lambda x: torch.std(0 * x, (2, 3)),
    "norm of zeros": lambda x: sum((0 * x).norm(p, (2, 3)) for p in (0.5, 1, 2, 3)),
    "norm of some zeros": lambda x: sum(torch.relu(x).norm(p, (2, 3)) for p in (-1, 0.5, 2)),
    "group_norm of torch": lambda x: torch.group_norm(x, 2, VECTOR, VECTOR, 1e-3, True),
    "instance_norm of torch": lambda x: torch.instance_norm(x, VECTOR, None, None, None, True, 0.1, 1e-3, True),
    "norm": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "norm 1": lambda x: torch.norm(x, 1, dim=(2, 3)),
    "norm inf": lambda x: torch.norm(x, math.inf, dim=(2, 3)),
    "linalg.vector_norm": lambda x: torch.linalg.vector_norm(x.permute(LAST), dim=(1, 2), keepdim=True),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "avg_pool2d of the extent": lambda x: F.avg_pool2d(x, tuple(x.shape[2:])),
    "avg_pool2d wider than the extent": lambda x: F.avg_pool2d(x, [2 + n for n in x.shape[2:]], ceil_mode=True),
    "max_pool2d wider than the extent": lambda x: F.max_pool2d(x, [2 + n for n in x.shape[2:]], ceil_mode=True),
    "sum of integers": lambda x: (x > 0).sum((2, 3)),
    "amax of bool": lambda x: (x > 2).amax((2, 3)),
    "norm 0": lambda x: torch.norm(torch.relu(x.detach()), 0, dim=(2, 3)),
    "norm in half precision": lambda x: (300 * x.detach().half()).norm(dim=(2, 3)),
    "mean in half precision": lambda x: (3000 + x.detach().half()).mean((2, 3)),
    "std in half precision": lambda x: (300 * x.detach().half()).std((2, 3)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (1, 1)),
    "instance_norm": lambda x: F.instance_norm(x, weight=VECTOR, bias=VECTOR),
    "group_norm": lambda x: F.group_norm(x, 2, VECTOR, VECTOR),
    "mul of its mean": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}

# Statistics over all visible sites: of dense images of one site each, `(rows, C, 1, 1)`.
OF_THE_BATCH: dict[str, Callable[[Any], Any]] = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, VECTOR, VECTOR, training=True),
    "sum of all": lambda x: x.sum(),
    "mean of all": lambda x: x.mean(),
    "mean of each channel": lambda x: x.mean((0, 2, 3)),
    "max": lambda x: x.max(),
    "prod of all": lambda x: x.abs().clamp(0.9, 1.1).prod(),
    "all of all": lambda x: torch.isfinite(x).all(),
    "median of all": lambda x: x.median(),
    "min": lambda x: x.min(),
}

# Masked sites hold -inf before pooling.
MAXIMA: dict[str, Callable[[Any], Any]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d rounded up": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_pool2d dilated": lambda x: F.max_pool2d(F.pad(x, (2, 2, 2, 2), value=-math.inf), 3, 1, 0, 2),
    "max_pool2d after pad": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2),
    "max_pool2d after pad on one side": lambda x: F.max_pool2d(F.pad(x - 3, (2, 0, 0, 2)), 3, 2),
    "max_pool2d after pad of zeros": lambda x: F.max_pool2d(F.pad(x - 3, (1, 1, 1, 1)), 3, 2),
    "adaptive_max_pool2d divisor": lambda x: F.adaptive_max_pool2d(x, (SPACE[0] // 2, SPACE[1] // 4)),
}


def check(x: SparseTensor, found: Any, expected: Tensor) -> None:
    """Compare an output, and the gradient of the features, where there is one."""
    dense = found.dense() if isinstance(found, SparseTensor) else found
    assert dense.shape == expected.shape == found.shape and dense.dtype == expected.dtype
    least = 1e-11 if dense.dtype == torch.float64 else 1e-3 if dense.dtype == torch.float16 else 0.0
    torch.testing.assert_close(dense, expected, rtol=least, atol=least, equal_nan=True)
    assert dense.requires_grad == expected.requires_grad
    if dense.requires_grad:
        grad = values(*dense.shape)
        ours = torch.autograd.grad(dense, x.features, grad)[0]
        theirs = torch.autograd.grad(expected, x.features, grad)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)


def dense_and_mask(function: Callable[[Any], Any], x: SparseTensor, fill: float = 0.0) -> Tensor:
    out = function(x.dense(fill))
    mask = x.layout.tiles.mask().view(BATCH, 1, *GRID)
    for d in (2, 3):
        mask = mask.repeat_interleave(out.shape[d] // GRID[d - 2], d)
    return torch.where(mask, 0, out)


def of_rows(function: Callable[[Any], Any], rows: Tensor) -> tuple[Tensor, bool]:
    """Return a function of one image that holds these rows, and whether it still has sites."""
    out = function(rows.t()[None, :, :, None])
    with_sites = out.ndim == 4 and out.shape[2:] == (len(rows), 1)
    return (out[0, :, :, 0].t() if with_sites else out), with_sites


@each_mask
@pytest.mark.parametrize("name", AT_SITES)
def test_function_is_the_dense_one_masked_after(name: str, counts: str) -> None:
    x, function = example(counts), AT_SITES[name]
    check(x, function(x), dense_and_mask(function, x))


@each_mask
@pytest.mark.parametrize("name", OF_IMAGES)
def test_statistics_are_of_the_visible_sites_of_each_image(name: str, counts: str) -> None:
    x, function = example(counts), OF_IMAGES[name]
    parts = []
    for rows in x.features.split(x.layout.row_splits.diff().tolist()):
        parts.append(of_rows(function, rows))
    out = torch.cat([part for part, _ in parts])
    check(x, function(x), SparseTensor(out, x.layout).dense() if parts[0][1] else out)


@each_mask
@pytest.mark.parametrize("name", [name for name in OF_IMAGES if "half" not in name])
def test_an_image_without_visible_sites_has_the_statistics_0(name: str, counts: str) -> None:
    mask = torch.ones(BATCH, *GRID, dtype=torch.bool)
    if counts == "random counts":
        mask[1:, 0, 0] = False
    layout = make_layout(mask, TILE)
    x = SparseTensor(values(layout.rows, CHANNELS).requires_grad_(), layout)
    with torch.autograd.set_detect_anomaly(True):
        found = OF_IMAGES[name](x)
        out = found.dense() if isinstance(found, SparseTensor) else found
        assert not out[0].any() and out.isfinite().all()
        if out.requires_grad:
            assert torch.autograd.grad(out.sum(), x.features)[0].isfinite().all()


@each_mask
@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_statistics_are_of_the_visible_sites_of_the_batch(name: str, counts: str) -> None:
    x, function = example(counts), OF_THE_BATCH[name]
    out = function(x.features[:, :, None, None])
    check(x, function(x), SparseTensor(out[:, :, 0, 0], x.layout).dense() if out.ndim == 4 else out)


@each_mask
@pytest.mark.parametrize("name", MAXIMA)
def test_masked_sites_do_not_compete_in_maxima(name: str, counts: str) -> None:
    x, function = example(counts), MAXIMA[name]
    check(x, function(x), dense_and_mask(function, x, -math.inf))


def test_batches_of_other_masks_and_sizes_leave_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "MOST_KEPT", 4)
    functions = {**AT_SITES, **MAXIMA}
    geometries = []
    for width in range(1, 7):
        layout = make_layout(torch.arange(2 * width).view(1, 2, width) % 3 == 1, TILE)
        x = SparseTensor(values(layout.rows, CHANNELS), layout)
        for name in ("conv2d", "conv_transpose2d", "interpolate bilinear", "max_pool2d", "max_pool2d dilated",
                     "avg_pool2d 3x3", "avg_pool2d without pad", "lp_pool2d"):  # fmt: skip
            functions[name](x)
        F.conv2d(x, W3, None, (2, 2), (1, 1), (1, 1))
        geometries.append(weakref.ref(x.layout.tiles))
    del layout, x
    gc.collect()
    assert not any(tiles() for tiles in geometries)
    assert max(len(windows._plans), len(convolutions._prepared)) <= once.MOST_KEPT


def test_transposed_convolution_of_one_channel_by_blocks_that_are_not_powers_of_two() -> None:
    layout = make_layout(draw_mask("random counts", BATCH, GRID, seed=2), 1)
    x = SparseTensor(values(layout.rows, 1).requires_grad_(), layout)
    layer = nn.ConvTranspose2d(1, 2, 3, 3, dtype=torch.float64)
    check(x, layer(x), dense_and_mask(layer, x))


@pytest.mark.parametrize("layer", [
    nn.Conv2d(CHANNELS, 6, 3, padding=1), nn.Conv2d(CHANNELS, 6, 3, 2, 1, groups=2), nn.Conv2d(CHANNELS, 6, 2, 2),
    nn.Conv2d(CHANNELS, 6, 1, 2), nn.Conv2d(CHANNELS, 8, 4, 4, groups=4), nn.ConvTranspose2d(CHANNELS, 6, 2, 2),
    nn.ConvTranspose2d(CHANNELS, 6, 4, 4, groups=2), nn.ConvTranspose2d(CHANNELS, 6, 3, 2, 1, 1),
], ids=str)  # fmt: skip
def test_what_a_layer_prepares_at_its_first_call_serves_later_ones(layer: nn.Module) -> None:
    whole = layer.double().requires_grad_(False)
    whole.weight.set_(torch.stack([whole.weight] * 2, -1)[..., 0])  # of any strides
    first = whole(example())
    for counts in ("random counts", "equal counts"):
        x = example(counts)
        check(x, whole(x), dense_and_mask(whole, x))
    assert torch.equal(whole(example()).features, first.features)
    integers = {name: value.long() for name, value in whole.named_parameters()}
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        torch.func.functional_call(whole, integers, (example().long(),))
