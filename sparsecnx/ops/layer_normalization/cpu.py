"""Layer normalization by the compiled CPU kernel (`csrc/cpu/layer_norm.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.tensor import SparseTensor


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Features `(rows, C)`."""
    out, _ = torch.ops.sparsecnx.layer_norm(x.features.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return out


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::layer_norm")
    def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), weight.new_empty(x.shape[0], 2)

    @torch.library.register_fake("sparsecnx::layer_norm_backward")
    def _(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1])

    def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, moments = ctx.saved_tensors
        grads = torch.ops.sparsecnx.layer_norm_backward(grad.contiguous(), x, weight, moments)
        return *grads, None

    torch.library.register_autograd("sparsecnx::layer_norm", _backward, setup_context=_setup_context)
