"""Convolution on an explicit kernel map by the compiled CPU kernel (`csrc/cpu/conv.cpp`, `kernels_conv.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.geometry.kernel_map import MappedRows
from sparsecnx.ops import flops


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (groups, K, C_in / groups, C_out / groups)`, `bias (C_out,)`.

    The gradient of the features inverts the kernel map: an inverse would take as much memory again until then.
    """
    if bias is not None:
        bias = bias.to(statistics_dtype(features.dtype)).contiguous()
    if 0 in weight.stride():  # One kernel for all channels, by expand(): the operator takes no shared memory.
        weight = weight.contiguous()
    return torch.ops.sparsecnx.conv(features.contiguous(), weight, bias, kernel_map.contiguous())


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`.

    The inverse map is not used: comparing it costs as much as inverting the kernel map.
    """
    return convolve(x.features, weight[None], bias, x.kernel_map)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        grads["x"] = torch.ops.sparsecnx.conv_input_grad(grad, saved.weight, saved.kernel_map, saved.shapes["x"][0])
    if "weight" in saved.needs:
        found = torch.ops.sparsecnx.conv_weight_grad(grad, saved.x, saved.weight, saved.kernel_map)
        grads["weight"] = found.permute(0, 3, 2, 1)
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


if compiled.loaded:
    register(
        "sparsecnx::conv",
        sizes={"x": "rows C", "kernel_map": "rows_out K", "weight": "groups K width out", "bias": "groups*out"},
        fake=lambda x, weight, bias, kernel_map: x.new_empty(kernel_map.shape[0], weight.shape[0] * weight.shape[3]),
        saves=("x", "weight", "bias", "kernel_map"),
        backward=_backward,
        flops=flops.conv,
    )
    register(
        "sparsecnx::conv_input_grad",
        public="conv",
        sizes={"grad": "rows_out C", "kernel_map": "rows_out K", "weight": "groups K width out"},
        fake=lambda grad, weight, kernel_map, rows_in: grad.new_empty(rows_in, weight.shape[0] * weight.shape[2]),
        flops=flops.conv_input_grad,
    )
    register(
        "sparsecnx::conv_weight_grad",
        public="conv",
        sizes={"grad": "rows_out C_out", "x": "rows C", "kernel_map": "rows_out K", "weight": "groups K width out"},
        fake=lambda grad, x, weight, kernel_map: weight.new_empty([weight.shape[axis] for axis in (0, 3, 2, 1)]),
        flops=flops.conv_weight_grad,
    )
