"""Global Response Normalization by the compiled CUDA kernels (`csrc/cuda/grn.cu`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.tensor import SparseTensor


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, segments: Tensor, eps: float) -> Tensor:
    """Features `(rows, C)`; `segments (S + 1,)` splits the rows into the groups normalised together."""
    features = x.features.contiguous()
    out, _ = torch.ops.sparsecnx_cuda.grn(features, gamma.contiguous(), beta.contiguous(), segments, eps)
    return out


if compiled.loaded:

    @torch.library.register_fake("sparsecnx_cuda::grn")
    def _(x: Tensor, gamma: Tensor, beta: Tensor, segments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), gamma.new_empty(segments.shape[0] - 1, x.shape[1])

    @torch.library.register_fake("sparsecnx_cuda::grn_backward")
    def _(
        grad: Tensor, x: Tensor, gamma: Tensor, segments: Tensor, energy: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gamma, _, segments, eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, segments, output[1])
        ctx.eps = eps

    def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, gamma, segments, energy = ctx.saved_tensors
        grads = torch.ops.sparsecnx_cuda.grn_backward(grad.contiguous(), x, gamma, segments, energy, ctx.eps)
        return *grads, None, None

    torch.library.register_autograd("sparsecnx_cuda::grn", _backward, setup_context=_setup_context)

    def _no_backward(*_: Any) -> None:
        raise NotImplementedError("gradients of a gradient of grn are not offered")

    torch.library.register_autograd("sparsecnx_cuda::grn_backward", _no_backward)
