"""The product of rows and a matrix by the compiled operator (`csrc/cpu/products.cpp`), which has all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.common.memory import check_memory
from sparsecnx.ops import flops


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `(rows, C_out)` for `weight (C_out, C)` and `bias (C_out,)` of the dtype of `x (rows, C)`."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.sparsecnx.linear(x, weight, bias)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        check_memory(weight=saved.weight)  # Its transpose would be refused without its name.
        grads["x"] = linear(grad, saved.weight.t(), None)
    if "weight" in saved.needs:
        grads["weight"] = torch.ops.sparsecnx.linear_weight_grad(grad, saved.x)
    if "bias" in saved.needs:
        grads["bias"] = grad.sum(0)
    return grads


def _weight_grad_backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    """Return the gradients of `weight_grad = grad.T @ x`; `grad` here is that of the result."""
    grads: dict[str, Tensor | None] = {}
    if "grad" in saved.needs:
        grads["grad"] = linear(saved.x, grad, None)
    if "x" in saved.needs:
        grads["x"] = linear(saved.grad, grad.t(), None)
    return grads


if compiled.loaded:
    register(
        "sparsecnx::linear",
        sizes={"x": "rows C", "weight": "out C", "bias": "out"},
        fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
        saves=("x", "weight"),
        backward=_backward,
        flops=flops.linear,
    )
    register(
        "sparsecnx::linear_weight_grad",
        public="linear",
        sizes={"grad": "rows out", "x": "rows C"},
        fake=lambda grad, x: x.new_empty(grad.shape[1], x.shape[1]),
        saves=("grad", "x"),
        backward=_weight_grad_backward,
        flops=flops.linear_weight_grad,
    )
