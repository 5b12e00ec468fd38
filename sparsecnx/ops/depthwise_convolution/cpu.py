"""Submanifold depthwise convolution by the compiled CPU kernel (`csrc/cpu/depthwise_conv.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.memory import check_memory
from sparsecnx.ops import flops
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.tensor import SparseTensor


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows, C)` of the convolution of `x` with `weight (C, 1, *kernel)`."""
    table = neighbour_table(x.layout, weight.shape[2:])
    return torch.ops.sparsecnx.depthwise_conv(x.features.contiguous(), weight.contiguous(), bias, table, x.layout.tile)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    x, weight, table, tile = saved.x, saved.weight, saved.table, saved.tile
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        # Active sites neighbour each other symmetrically: the adjoint is the flipped kernel.
        check_memory(weight=weight)
        grads["x"] = torch.ops.sparsecnx.depthwise_conv(grad, weight.flip(*range(2, weight.ndim)), None, table, tile)
    if "weight" in saved.needs:
        grads["weight"] = torch.ops.sparsecnx.depthwise_conv_weight_grad(grad, x, table, tile, weight.shape[2:])
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


if compiled.loaded:
    register(
        "sparsecnx::depthwise_conv",
        sizes={"x": "rows C", "weight": "C 1 ...", "bias": "C"},
        fake=lambda x, weight, bias, table, tile: torch.empty_like(x),
        saves=("x", "weight", "bias", "table", "tile"),
        backward=_backward,
        flops=flops.depthwise_conv,
    )
    register(
        "sparsecnx::depthwise_conv_weight_grad",
        public="depthwise_conv",
        flops=flops.depthwise_conv_weight_grad,
        fake=lambda grad, x, table, tile, kernel: x.new_empty(x.shape[1], 1, *kernel),
    )
