"""The fused ConvNeXt V2 block on the CPU (`csrc/cpu/convnextv2_block.cpp`).

It keeps for backward: `x`, the depthwise output `u`, the moments of its rows, the GRN energies, and, unless it is
recomputed, the hidden layer before its bias and activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.registration import Saved, register
from sparsecnx.ops import flops
from sparsecnx.ops.block.parameters import SIZES, BlockParameters
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.ops.global_response_norm.groups import group_splits
from sparsecnx.tensor import SparseTensor

# Recomputing the hidden layer costs one matrix product in seven. It is done up to this width, the first stage of Atto
# to Pico: without it they would keep a fifth of what the compiled dense encoder keeps (saved_bytes of
# benchmarks/encoder.py).
RECOMPUTE_CHANNELS = 64


def convnextv2_block(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    recompute: bool | None,
) -> Tensor:
    """Return features `(rows, C)` of the block; `recompute=None` decides by C."""
    keep_hidden = not (_recomputes(x) if recompute is None else recompute) and torch.is_grad_enabled()
    row_scale = None if survival is None else survival[x.layout.row_image()]
    table = neighbour_table(x.layout, p.dwconv_weight.shape[2:])
    out, *_ = torch.ops.sparsecnx.convnextv2_block(
        x.features.contiguous(),
        *p,
        row_scale,
        table,
        group_splits(x.layout, scope),
        x.layout.tile,
        eps,
        grn_eps,
        keep_hidden,
    )
    return out


def detail(x: SparseTensor) -> str:
    """Return what `recompute=None` decides for `x`."""
    if _recomputes(x):
        return f"hidden layer recomputed in backward (up to {RECOMPUTE_CHANNELS} channels)"
    return f"hidden layer kept for backward (above {RECOMPUTE_CHANNELS} channels)"


def _recomputes(x: SparseTensor) -> bool:
    return x.features.shape[1] <= RECOMPUTE_CHANNELS


def _fake(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    grn_gamma: Tensor,
    grn_beta: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    row_scale: Tensor | None,
    table: Tensor,
    splits: Tensor,
    tile: Sequence[int],
    eps: float,
    grn_eps: float,
    keep_hidden: bool,
) -> tuple[Tensor, ...]:
    rows, width = x.shape[0], pwconv1_weight.shape[0]
    moments, energy = norm_weight.new_empty(rows, 2), norm_weight.new_empty(splits.shape[0] - 1, width)
    return torch.empty_like(x), torch.empty_like(x), moments, energy, x.new_empty(rows if keep_hidden else 0, width)


def _fake_backward(grad: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(torch.empty_like(parameter) for parameter in rest[: len(BlockParameters._fields)])


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    parameters = [getattr(saved, name) for name in BlockParameters._fields]
    places = saved.row_scale, saved.table, saved.splits, saved.tile, saved.eps, saved.grn_eps
    grads = torch.ops.sparsecnx.convnextv2_block_backward(grad, saved.x, *parameters, *places, *saved.outputs)
    return dict(zip(("x", *BlockParameters._fields), grads, strict=True))


if compiled.loaded:
    register(
        "sparsecnx::convnextv2_block",
        sizes=SIZES,
        fake=_fake,
        saves=("x", *BlockParameters._fields, "row_scale", "table", "splits", "tile", "eps", "grn_eps"),
        backward=_backward,
        flops=flops.block,
    )
    register(
        "sparsecnx::convnextv2_block_backward",
        public="convnextv2_block",
        fake=_fake_backward,
        flops=flops.block_backward,
    )
