"""Depthwise convolution on a kernel map by compiled kernels (`csrc/cpu/mapped.cpp`, `kernels_mapped.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.kernel_map import MappedRows, check_inverse_map, invert_kernel_map
from sparsecnx.geometry.tile_maps import inverted, rows_out, taps
from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops import flops


def mapped_depthwise_conv(x: MappedRows | WindowRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows_out, C)`; `weight (K, C)`, `bias (C,)`."""
    kernel_map, *window = x.compiled_map
    arguments = x.features.contiguous(), weight.contiguous(), bias, kernel_map
    if isinstance(x, MappedRows) and x.inverse_map is not None:
        return torch.ops.sparsecnx_mapped.depthwise_conv_kept(*arguments, x.inverse_map.contiguous())
    return torch.ops.sparsecnx.mapped_depthwise_conv(*arguments, None, *window)


def _depthwise_conv_kept(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor
) -> Tensor:
    """Keep the inverse map for the gradient. The compiled operator would compare it, here for nothing."""
    if inverse_map.dtype != torch.int32 or inverse_map.shape != (x.shape[0], kernel_map.shape[1]):
        raise ValueError(f"inverse_map is {inverse_map.dtype} {tuple(inverse_map.shape)}: expected int32 (rows_in, K)")
    check_memory(inverse_map=inverse_map)
    out: Tensor = torch.ops.sparsecnx.mapped_depthwise_conv(x, weight, bias, kernel_map, None, [], [])
    return out


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grid, window = saved.grid, saved.window
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        if window:
            grads["x"] = torch.ops.sparsecnx.mapped_depthwise_conv(
                grad, saved.weight, None, saved.kernel_map, None, grid, inverted(window)
            )
        else:
            grads["x"] = _input_grad(saved, grad)
    if "weight" in saved.needs:
        weight_grad = torch.ops.sparsecnx.mapped_depthwise_conv_weight_grad
        grads["weight"] = weight_grad(grad, saved.x, saved.kernel_map, grid, window)
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


def _input_grad(saved: Saved, grad: Tensor) -> Tensor:
    """Return the gradient of x, which gathers through the inverse map: every row from the output rows that read it.

    The kernel compares an inverse map that was given as it reads it. One that is computed here needs no comparison.
    """
    kernel_map, inverse_map = saved.kernel_map, saved.inverse_map
    if inverse_map is None:
        inverse_map, given = invert_kernel_map(kernel_map, saved.shapes["x"][0]), None
    else:
        given = kernel_map
    try:
        return torch.ops.sparsecnx.mapped_depthwise_conv(grad, saved.weight, None, inverse_map, given, [], [])
    except RuntimeError:
        if given is not None:
            check_inverse_map(kernel_map, inverse_map)  # which calls the maps by their names
        raise


def _kept_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    saved.grid, saved.window = [], []
    return _backward(saved, grad)


if compiled.loaded:
    register(
        "sparsecnx::mapped_depthwise_conv",
        sizes={"x": "rows C", "weight": "K C", "bias": "C"},
        fake=lambda x, weight, bias, kernel_map, inverse_map, grid, window: x.new_empty(
            rows_out(kernel_map, window), x.shape[1]
        ),
        saves=("x", "weight", "bias", "kernel_map", "inverse_map", "grid", "window"),
        backward=_backward,
        flops=flops.mapped_depthwise_conv,
    )
    register(
        "sparsecnx_mapped::depthwise_conv_kept",
        public="mapped_depthwise_conv",
        function=_depthwise_conv_kept,
        fake=lambda x, weight, bias, kernel_map, inverse_map: x.new_empty(kernel_map.shape[0], x.shape[1]),
        saves=("x", "weight", "bias", "kernel_map", "inverse_map"),
        backward=_kept_backward,
        flops=flops.mapped_depthwise_conv,
    )
    register(
        "sparsecnx::mapped_depthwise_conv_weight_grad",
        public="mapped_depthwise_conv",
        flops=flops.mapped_depthwise_conv_weight_grad,
        fake=lambda grad, x, kernel_map, grid, window: x.new_empty(taps(kernel_map, window), x.shape[1]),
    )
