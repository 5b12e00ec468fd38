"""Convolution on a kernel map by the compiled CPU kernel (`csrc/cpu/conv.cpp`, `kernels_conv.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.kernel_map import MappedRows, invert_kernel_map
from sparsecnx.geometry.tile_maps import inverted, rows_out
from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops import flops


def convolve(x: MappedRows | WindowRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (groups, K, C_in / groups, C_out / groups)`, `bias (C_out,)`.

    The gradient of the features inverts a kernel map that is given: an inverse would take as much memory again until
    then, and to compare it costs as much.
    """
    if bias is not None:
        bias = bias.to(statistics_dtype(x.dtype)).contiguous()
    if 0 in weight.stride():  # One kernel for all channels, by expand(): the operator takes no shared memory.
        weight = weight.contiguous()
    return torch.ops.sparsecnx.conv(x.features.contiguous(), weight, bias, *x.compiled_map)


def mapped_conv(x: MappedRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C_out)`; `weight (K, C_in, C_out)`, `bias (C_out,)`."""
    return convolve(x, weight[None], bias)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads: dict[str, Tensor | None] = {}
    kernel_map, grid, window = saved.kernel_map, saved.grid, saved.window
    if "x" in saved.needs:
        check_memory(weight=saved.weight)
        inverse = kernel_map if window else invert_kernel_map(kernel_map, saved.shapes["x"][0])
        grads["x"] = torch.ops.sparsecnx.conv(grad, saved.weight.mT, None, inverse, grid, inverted(window))
    if "weight" in saved.needs:
        found = torch.ops.sparsecnx.conv_weight_grad(grad, saved.x, saved.weight, kernel_map, grid, window)
        grads["weight"] = found.permute(0, 3, 2, 1)
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


def _fake_weight_grad(  # type: ignore[no-untyped-def]
    grad, x, weight: Tensor, kernel_map, grid, window
) -> Tensor:
    groups, taps, width, out = weight.shape
    if weight.stride(2) == 1:
        return weight.new_empty(groups, out, taps, width).mT
    return weight.new_empty(groups, out, width, taps)


if compiled.loaded:
    register(
        "sparsecnx::conv",
        sizes={"x": "rows C", "weight": "groups K width out", "bias": "groups*out"},
        fake=lambda x, weight, bias, kernel_map, grid, window: x.new_empty(
            rows_out(kernel_map, window), weight.shape[0] * weight.shape[3]
        ),
        saves=("x", "weight", "bias", "kernel_map", "grid", "window"),
        backward=_backward,
        flops=flops.conv,
    )
    register(
        "sparsecnx::conv_weight_grad",
        public="conv",
        sizes={"grad": "rows_out C_out", "x": "rows C", "weight": "groups K width out"},
        fake=_fake_weight_grad,
        flops=flops.conv_weight_grad,
    )
