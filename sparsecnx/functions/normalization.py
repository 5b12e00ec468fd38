"""Normalisation with statistics over visible sites alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx import ops
from sparsecnx.functions.table import Handler, answers, channels_first, like, refuse
from sparsecnx.ops.checks import check_device
from sparsecnx.tensor import HANDLERS, SparseTensor


def _over_sites(name: str) -> Handler:
    """Return a function that takes what `torch.nn.functional` and `sparsecnx.ops` both take."""
    operator = getattr(ops, name)

    def handler(input: Any, *args: Any, **kwargs: Any) -> SparseTensor:
        out: SparseTensor = operator(channels_first(input, name), *args, **kwargs)
        return out

    return handler


for _name, _meaning in {
    "batch_norm": "statistics over the visible sites of the batch: biased to normalise, unbiased for running_var",
    "instance_norm": "statistics over the visible sites of each image",
}.items():
    answers(_name, meaning=_meaning)(_over_sites(_name))


@answers("group_norm", meaning="statistics over the visible sites of each image and the channels of a group")
def group_norm(
    input: SparseTensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> SparseTensor:
    return ops.group_norm(channels_first(input, "group_norm"), num_groups, weight, bias, eps)


@answers("layer_norm", meaning="over channels that are last", limits="normalized_shape (C,); x is channels-last")
def layer_norm(
    input: SparseTensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> SparseTensor:
    _check_normalized(input, normalized_shape, "layer_norm", weight)
    if weight is None or bias is None:
        return like(input, F.layer_norm(input.features, tuple(normalized_shape), weight, bias, eps))
    return ops.layer_norm(input, weight, bias, eps)


@answers("rms_norm", meaning="over channels that are last", limits="normalized_shape (C,); x is channels-last")
def rms_norm(
    input: SparseTensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> SparseTensor:
    _check_normalized(input, normalized_shape, "rms_norm", weight)
    return like(input, F.rms_norm(input.features, tuple(normalized_shape), weight, eps))


def _in_order_of_torch(handler: Handler) -> Handler:
    """Take the arguments of torch.batch_norm: weight and bias before the running statistics, and cudnn_enabled."""

    def reordered(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *args: Any, **named: Any) -> Any:
        named.pop("cudnn_enabled", None)
        return handler(x, running_mean, running_var, weight, bias, *args[:3], **named)

    return reordered


def _without_cudnn(handler: Handler) -> Handler:
    """Take the arguments of torch.group_norm, which has one more than F.group_norm."""

    def shortened(*args: Any, cudnn_enabled: bool = True, cudnn_enable: bool = True, **named: Any) -> Any:
        return handler(*args[:5], **named)

    return shortened


HANDLERS[torch.batch_norm] = _in_order_of_torch(HANDLERS[F.batch_norm])
HANDLERS[torch.instance_norm] = _in_order_of_torch(HANDLERS[F.instance_norm])
HANDLERS[torch.group_norm] = _without_cudnn(group_norm)
HANDLERS[torch.layer_norm] = _without_cudnn(layer_norm)


def _check_normalized(x: Any, shape: Sequence[int], name: str, weight: Tensor | None) -> None:
    if not isinstance(x, SparseTensor):
        refuse(name, "its weight is a SparseTensor", "only the input can be one")
    if not x.channels_last or tuple(shape) != tuple(x.features.shape[1:]):
        refuse(name, f"normalized_shape is {tuple(shape)} of {tuple(x.shape)}, which is not its channels alone",
               f"expected {tuple(x.features.shape[1:])}" if x.channels_last else
               "permute the channels to the end, or use group_norm with one group")  # fmt: skip
    if weight is not None:
        check_device(weight, "weight", x)


@answers("local_response_norm", meaning="over channels")
def local_response_norm(
    input: SparseTensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> SparseTensor:
    x = channels_first(input, "local_response_norm")
    return like(x, F.local_response_norm(x.features[..., None], size, alpha, beta, k)[..., 0])
