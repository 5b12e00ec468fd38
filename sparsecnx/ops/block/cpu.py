"""The fused ConvNeXt V2 block on the CPU (`csrc/cpu/convnextv2_block.cpp`).

Kept for backward: `x`, the depthwise output `u`, the moments of its rows, the GRN energies, and, unless it
is recomputed, the hidden layer before its bias and activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table
from sparsecnx.tensor import SparseTensor

# Recomputing the hidden layer costs one GEMM in seven. Up to this width, the first stage of Atto to Pico, it is done:
# without it they would keep a fifth of what the compiled dense encoder keeps (benchmarks/encoder.py, saved_bytes).
RECOMPUTE_CHANNELS = 64


def convnextv2_block(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    segments: Tensor,
    eps: float,
    recompute: bool | None,
) -> Tensor:
    """Features `(rows, C)` of the block; `recompute=None` decides by C."""
    if recompute is None:
        recompute = _recomputes(x)
    keep_hidden = not recompute and torch.is_grad_enabled()
    row_scale = None if survival is None else survival[x.layout.row_image()]
    table = neighbour_table(x.layout, p.dwconv_weight.shape[2:])
    features, parameters = x.features.contiguous(), (value.contiguous() for value in p)
    out, *_ = torch.ops.sparsecnx.convnextv2_block(
        features, *parameters, row_scale, table, segments, x.layout.tile, eps, keep_hidden
    )
    return out


def detail(x: SparseTensor) -> str:
    """What `recompute=None` decides for `x`."""
    if _recomputes(x):
        return f"hidden layer recomputed in backward (up to {RECOMPUTE_CHANNELS} channels)"
    return f"hidden layer kept for backward (above {RECOMPUTE_CHANNELS} channels)"


def _recomputes(x: SparseTensor) -> bool:
    return x.features.shape[1] <= RECOMPUTE_CHANNELS


if compiled.loaded:

    @torch.library.register_fake("sparsecnx::convnextv2_block")
    def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        p = BlockParameters(*rest[:10])
        segments, keep_hidden = rest[12], rest[15]
        hidden = x.new_empty(x.shape[0] if keep_hidden else 0, p.pwconv1_weight.shape[0])
        moments = p.norm_weight.new_empty(x.shape[0], 2)
        energy = p.norm_weight.new_empty(segments.shape[0] - 1, p.pwconv1_weight.shape[0])
        return torch.empty_like(x), torch.empty_like(x), moments, energy, hidden

    @torch.library.register_fake("sparsecnx::convnextv2_block_backward")
    def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(x), *(torch.empty_like(parameter) for parameter in rest[:10])

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *parameters = inputs[:11]
        row_scale, table, segments, tile, eps, _ = inputs[11:]
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # zeros in the shape of the hidden layer, which nobody reads
        ctx.save_for_backward(x, *parameters, row_scale, table, segments, *saved)
        ctx.tile, ctx.eps = tile, eps

    def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 17
        x, *rest = ctx.saved_tensors
        parameters, (row_scale, table, segments), saved = rest[:10], rest[10:13], rest[13:]
        grads = torch.ops.sparsecnx.convnextv2_block_backward(
            grad.contiguous(), x, *parameters, row_scale, table, segments, ctx.tile, ctx.eps, *saved
        )
        return *grads, *[None] * 6

    torch.library.register_autograd("sparsecnx::convnextv2_block", _backward, setup_context=_setup_context)
