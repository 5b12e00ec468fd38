"""Submanifold depthwise convolution by the CUDA kernels (`csrc/cuda/depthwise_squares.cuh` says how they work)."""

from __future__ import annotations

from collections.abc import Sequence

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
    return torch.ops.sparsecnx_cuda.depthwise_conv(
        x.features.contiguous(), weight.contiguous(), bias, table, x.layout.tile
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    tile: Sequence[int],
    *,
    residual: Tensor | None = None,
    flip: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve rows, as `triton_kernels.convolve`.

    Args:
        x: `(rows, C)`.
        weight: `(C, 1, *kernel)`, of the dtype of `x`.
        bias: float32 `(C,)` or None.
        table: table of neighbouring tiles.
        tile: sites per tile along each axis.
        residual: `(rows, C)`, added to the output.
        flip: whether the kernel is mirrored along all axes, as the gradient needs it.
        normalise: eps of a LayerNorm without scale and shift over the output, None for none.

    Returns:
        `(rows, C)`, and of the normalisation `1 / sqrt(variance + eps)`, float32 `(rows,)`, empty without it.
    """
    return torch.ops.sparsecnx_cuda.depthwise_conv_fused(x, weight, bias, residual, table, tile, flip, normalise)


def weight_grad(
    grad: Tensor, x: Tensor, table: Tensor, tile: Sequence[int], kernel: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight, `(C, 1, *kernel)` in the dtype of `x`, and of the bias, float32 `(C,)`.

    Args:
        grad: `(rows, C)`, gradient of the output.
        x: `(rows, C)`, input.
        table: table of neighbouring tiles.
        tile: sites per tile along each axis.
        kernel: its size along each axis.
    """
    return torch.ops.sparsecnx_cuda.depthwise_conv_weight_grad(grad, x, table, tile, kernel)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    weight, table, tile = saved.weight, saved.table, saved.tile
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        # Active sites neighbour each other symmetrically: the adjoint is the flipped kernel.
        if torch.is_grad_enabled():  # This gradient is to be differentiated in turn.
            check_memory(weight=weight)
            flipped = weight.flip(*range(2, weight.ndim))
            grads["x"] = torch.ops.sparsecnx_cuda.depthwise_conv(grad, flipped, None, table, tile)
        else:
            grads["x"], _ = convolve(grad, weight, None, table, tile, flip=True)
    if "weight" in saved.needs:
        grads["weight"], grads["bias"] = weight_grad(grad, saved.x, table, tile, weight.shape[2:])
    elif "bias" in saved.needs:
        grads["bias"] = grad.sum(0, dtype=saved.bias.dtype)
    return grads


if compiled.loaded:
    register(
        "sparsecnx_cuda::depthwise_conv",
        sizes={"x": "rows C", "weight": "C 1 ...", "bias": "C"},
        fake=lambda x, weight, bias, table, tile: torch.empty_like(x),
        saves=("x", "weight", "bias", "table", "tile"),
        backward=_backward,
        flops=flops.depthwise_conv,
    )
    register(
        "sparsecnx_cuda::depthwise_conv_fused",
        sizes={"x": "rows C", "weight": "C 1 ...", "bias": "C"},
        public="depthwise_conv",
        flops=flops.depthwise_conv,
        fake=lambda x, weight, bias, residual, table, tile, flip, eps: (
            torch.empty_like(x),
            x.new_empty(0 if eps is None else x.shape[0], dtype=torch.float32),
        ),
    )
    register(
        "sparsecnx_cuda::depthwise_conv_weight_grad",
        public="depthwise_conv",
        flops=flops.depthwise_conv_weight_grad,
        fake=lambda grad, x, table, tile, kernel: (
            x.new_empty(x.shape[1], 1, *kernel),
            x.new_empty(x.shape[1], dtype=torch.float32),
        ),
    )
