"""Run the fused ConvNeXt V2 block in Triton, forward and backward.

`triton_kernels.py` has the formulas and the kernels. The depthwise steps are Triton's or those of CUDA C++, the same
ones in forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_launch import alignment, blocks, launch, processors, row_sizes
from sparsecnx.ops import flops
from sparsecnx.ops.block.parameters import SIZES, BlockParameters
from sparsecnx.ops.block.triton_folding import fold, unfold
from sparsecnx.ops.block.triton_kernels import (
    column_sums_kernel,
    kept_gradients_kernel,
    kept_sums_kernel,
    linear_gelu_kernel,
    linear_scaled_kernel,
    recomputed_gradients_kernel,
    recomputed_sums_kernel,
)
from sparsecnx.ops.depthwise_convolution import cuda as depthwise_cuda
from sparsecnx.ops.depthwise_convolution import triton_kernels as depthwise_triton
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.ops.global_response_norm import triton_kernels as grn
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.ops.layer_normalization import triton_kernels as layer_norm
from sparsecnx.tensor import SparseTensor

# Up to this width the hidden layer is computed again in backward, three matrix products more, rather than keeping 4C of
# the 6C values a row would keep. By counts, not measured: docs/dev/kernels.md.
RECOMPUTE_CHANNELS = 512

KEPT_ROWS, RECOMPUTED_ROWS = 32, 64  # of a block of the kernels of gradients

# The modules whose kernels can do the depthwise steps.
DEPTHWISE: dict[str, Any] = {"triton": depthwise_triton, "cuda": depthwise_cuda}


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, row_group: Tensor, groups: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `gelu(x @ weight.T + bias)`.

    Returns:
        hidden: `(rows, N)`.
        pre: what GELU was applied to, `(rows, N)`; without `keep` no rows.
        partial: staircase sums of the squares of hidden, float32 `(row blocks + groups, N)`.
    """
    rows, outputs, block_m = x.shape[0], weight.shape[0], _block_rows(x)
    hidden, pre = x.new_empty(rows, outputs), x.new_empty(rows if keep else 0, outputs)
    partial = grn.partial_sums(rows, groups, outputs, block_m, x)
    inputs = {"x": x, "weight": weight, "bias": bias, "row_group": row_group}
    outs = {"pre": pre if keep else None, "hidden": hidden, "partial": partial}
    _launch(linear_gelu_kernel, x, outputs, block_m, **inputs, **outs)
    return hidden, pre, partial


def linear_scaled(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    row_scale: Tensor | None,
    row_group: Tensor,
) -> Tensor:
    """Return `residual + row_scale * ((hidden * scale[row_group]) @ weight.T + bias)`, `(rows, N)`."""
    out = torch.empty_like(residual)
    _launch(
        linear_scaled_kernel,
        hidden,
        weight.shape[0],
        _block_rows(hidden),
        hidden=hidden,
        scale=scale.to(hidden.dtype),
        weight=weight,
        bias=bias,
        residual=residual,
        row_scale=row_scale,
        row_group=row_group,
        out=out,
    )
    return out


def column_sums(x: Tensor, row_scale: Tensor | None) -> Tensor:
    """Return the sum of the rows of `x (rows, C)`, each times its scale, float32 `(C,)`, in two stages."""
    rows, channels = x.shape
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = 32 * 4 * 16 // x.element_size() // block_c  # 16 bytes for each of 128 threads
    wide = blocks(channels, block_c)
    ranges = max(1, min(blocks(4 * processors(x.device), wide), rows // (8 * block_r)))
    blocks_per_program = blocks(blocks(rows, ranges), block_r)
    ranges = max(1, blocks(rows, blocks_per_program * block_r)) if rows else 1
    partial = torch.empty(ranges, channels, dtype=torch.float32, device=x.device)
    tensors = {"x": x, "row_scale": row_scale, "partial": partial}
    sizes = {"blocks_per_program": blocks_per_program, **row_sizes(rows, channels, block_r, block_c)}
    launch(column_sums_kernel, (wide, ranges), **tensors, **sizes, num_warps=4)
    return partial.sum(0)


def _launch(kernel: Any, left: Tensor, outputs: int, block_m: int, **tensors: Tensor | None) -> None:
    """Launch a kernel on blocks of a matrix `(rows, outputs)`, for products with the rows of `left (rows, K)`."""
    rows, channels = left.shape
    if rows == 0:
        return
    block_k = 64 if left.dtype != torch.float32 and channels % 64 == 0 else 32
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    high = blocks(rows, block_m)
    launch(
        kernel,
        lambda meta: (high * blocks(outputs, meta["BLOCK_N"]),),
        **tensors,
        ROWS=rows,
        N=outputs,
        K=channels,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        EVEN_K=channels % block_k == 0,
        PRECISION="tf32x3" if exact else "tf32",
        ALIGN=alignment(outputs, channels),
    )


def _block_rows(x: Tensor) -> int:
    """Return the rows of a block of the matrix products."""
    return 64 if x.dtype == torch.float32 else 128


def hidden_backward(
    grad: Tensor,
    p: BlockParameters,
    folded: tuple[Tensor, Tensor],
    row_scale: Tensor | None,
    row_group: Tensor,
    splits: Tensor,
    grn_eps: float,
    normalised: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients through the second matrix, GRN and GELU.

    Args:
        folded: W1' and b1'.

    Returns:
        grad_pre: gradient of what GELU was applied to, `(rows, 4C)`.
        scaled: the hidden layer times scales of GRN and rows, `(rows, 4C)`.
        grad_gamma: float32 `(4C,)`.
        grad_bias1: float32 `(4C,)`, sum of the rows of grad_pre.
    """
    rows, (groups, hidden), kept = grad.shape[0], energy.shape, pre.shape[0] == grad.shape[0]
    by_row = {"row_scale": row_scale, "row_group": row_group}
    matrices = {"grad": grad, "weight2": p.pwconv2_weight}
    block_m = _block_rows(grad)
    partial = grn.partial_sums(rows, groups, hidden, block_m, grad)
    if kept:
        product = torch.empty_like(pre)
        tensors = {**matrices, "pre": pre, **by_row, "product": product}
        _launch(kept_sums_kernel, grad, hidden, block_m, **tensors, partial=partial)
    else:
        matrices |= {"normalised": normalised, "weight1": folded[0], "bias1": folded[1]}
        _launch(recomputed_sums_kernel, grad, hidden, block_m, **matrices, **by_row, partial=partial)
    grad_gamma, grad_energy, scale = grn.response_backward(partial, splits, block_m, energy, p.grn_gamma, grn_eps)

    by_row |= {"scale": scale, "grad_energy": grad_energy}
    block_m = KEPT_ROWS if kept else RECOMPUTED_ROWS
    scaled = grad.new_empty(rows, hidden)
    grad_pre = product if kept else torch.empty_like(scaled)
    partial = grn.partial_sums(rows, 0, hidden, block_m, grad)
    outs = {"grad_pre": grad_pre, "scaled": scaled, "partial": partial}
    if kept:
        block_n, registers = 128, 255 if grad.dtype == torch.float32 else None
        grid = (blocks(rows, block_m) * blocks(hidden, block_n),)
        sizes = {"ROWS": rows, "N": hidden, "BLOCK_M": block_m, "BLOCK_N": block_n, "ALIGN": alignment(hidden)}
        tensors = {"product": product, "pre": pre, **by_row, **outs}
        launch(kept_gradients_kernel, grid, **tensors, **sizes, num_stages=1, maxnreg=registers)
    else:
        _launch(recomputed_gradients_kernel, grad, hidden, block_m, **matrices, **by_row, **outs)
    return grad_pre, scaled, grad_gamma, partial.sum(0)


def recomputes(x: SparseTensor, recompute: bool | None = None) -> bool:
    """Return whether backward computes the hidden layer again. With None the number of channels decides."""
    return x.features.shape[1] <= RECOMPUTE_CHANNELS if recompute is None else recompute


def detail(x: SparseTensor) -> str:
    """Return how the block runs on `x`."""
    return "hidden layer recomputed in backward" if recomputes(x) else "hidden layer kept for backward"


def convnextv2_block(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    recompute: bool | None,
    depthwise: str = "triton",
) -> Tensor:
    """Return features `(rows, C)` of the block; `recompute=None` decides by C, `depthwise` is one of `DEPTHWISE`."""
    if depthwise == "triton":
        depthwise_triton.check_kernel(p.dwconv_weight, "dwconv_weight")
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in (x.features, *p))
    keep = wanted and not recomputes(x, recompute)
    row_scale = None if survival is None else survival[x.layout.row_image()]
    table = neighbour_table(x.layout, p.dwconv_weight.shape[2:])
    places = row_scale, row_groups(x.layout, scope), table, group_splits(x.layout, scope), x.layout.tile
    p = p._replace(grn_gamma=p.grn_gamma.flatten(), grn_beta=p.grn_beta.flatten())
    features, parameters = x.features.contiguous(), [value.contiguous() for value in p]
    out, *_ = torch.ops.sparsecnx_triton.convnextv2_block(features, *parameters, *places, eps, grn_eps, depthwise, keep)
    return out


def _block(
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
    row_group: Tensor,
    table: Tensor,
    splits: Tensor,
    tile: list[int],
    eps: float,
    grn_eps: float,
    depthwise: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the block's features, and what backward needs: normalised, rstd, energy, pre (no rows without `keep`)."""
    weight1, bias1 = fold(pwconv1_weight, norm_weight, norm_bias, pwconv1_bias)
    weight2, bias2 = fold(pwconv2_weight, None, grn_beta, pwconv2_bias)
    convolve = DEPTHWISE[depthwise].convolve
    normalised, rstd = convolve(x, dwconv_weight, dwconv_bias, table, tile, normalise=eps)
    hidden, pre, partial = linear_gelu(normalised, weight1, bias1, row_group, splits.shape[0] - 1, keep)
    energy, scale = grn.response(partial, splits, _block_rows(x), grn_gamma, grn_eps)
    out = linear_scaled(hidden, scale, weight2, bias2, x, row_scale, row_group)
    return out, normalised, rstd, energy, pre


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, splits, _, _, _, _, keep = rest
    rows, hidden = x.shape[0], BlockParameters(*rest[:10]).pwconv1_weight.shape[0]
    rstd = x.new_empty(rows, dtype=torch.float32)
    energy = x.new_empty(splits.shape[0] - 1, hidden, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), rstd, energy, x.new_empty(rows if keep else 0, hidden)


def _block_backward(
    grad: Tensor,
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
    row_group: Tensor,
    table: Tensor,
    splits: Tensor,
    tile: list[int],
    grn_eps: float,
    depthwise: str,
    normalised: Tensor,
    rstd: Tensor,
    energy: Tensor,
    pre: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the ten parameters."""
    p = BlockParameters(
        dwconv_weight,
        dwconv_bias,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        grn_gamma,
        grn_beta,
        pwconv2_weight,
        pwconv2_bias,
    )
    folded = fold(p.pwconv1_weight, p.norm_weight, p.norm_bias, p.pwconv1_bias)
    grad_pre, scaled, grad_gamma, grad_bias1 = hidden_backward(
        grad, p, folded, row_scale, row_group, splits, grn_eps, normalised, energy, pre
    )
    # pwconv2, whose input is h s + beta: `scaled` is h s times the scale of the rows.
    grad_bias2 = column_sums(grad, row_scale)
    product = torch.mm(grad.t(), scaled)
    grad_weight2, _, grad_beta = unfold(product, p.pwconv2_weight, grad_bias2, None, p.grn_beta)
    del scaled
    # pwconv1, whose input is û * norm_weight + norm_bias.
    product = torch.mm(grad_pre.t(), normalised)
    grad_weight1, grad_norm_weight, grad_norm_bias = unfold(
        product, p.pwconv1_weight, grad_bias1, p.norm_weight, p.norm_bias
    )
    grad_normalised = torch.mm(grad_pre, folded[0])
    del grad_pre
    grad_conv = layer_norm.normalised_backward(grad_normalised, normalised, rstd)
    kernels = DEPTHWISE[depthwise]
    grad_taps, grad_conv_bias = kernels.weight_grad(grad_conv, x, table, tile, tuple(p.dwconv_weight.shape[2:]))
    grad_x, _ = kernels.convolve(grad_conv, p.dwconv_weight, None, table, tile, residual=grad, flip=True)
    grads = BlockParameters(
        dwconv_weight=grad_taps,
        dwconv_bias=grad_conv_bias,
        norm_weight=grad_norm_weight,
        norm_bias=grad_norm_bias,
        pwconv1_weight=grad_weight1,
        pwconv1_bias=grad_bias1,
        grn_gamma=grad_gamma,
        grn_beta=grad_beta,
        pwconv2_weight=grad_weight2,
        pwconv2_bias=grad_bias2,
    )
    return grad_x, *grads


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    parameters = [getattr(saved, name) for name in BlockParameters._fields]
    places = saved.row_scale, saved.row_group, saved.table, saved.splits, saved.tile, saved.grn_eps, saved.depthwise
    grads = torch.ops.sparsecnx_triton.convnextv2_block_backward(grad, saved.x, *parameters, *places, *saved.outputs)
    return dict(zip(("x", *BlockParameters._fields), grads, strict=True))


SAVED = ("x", *BlockParameters._fields, "row_scale", "row_group", "table", "splits", "tile", "grn_eps", "depthwise")
register(
    "sparsecnx_triton::convnextv2_block",
    sizes=SIZES,
    function=_block,
    fake=_fake,
    saves=SAVED,
    backward=_backward,
    flops=flops.block,
)
register(
    "sparsecnx_triton::convnextv2_block_backward",
    public="convnextv2_block",
    function=_block_backward,
    fake=lambda grad, x, *rest: tuple(map(torch.empty_like, (x, *rest[: len(BlockParameters._fields)]))),
    flops=flops.block_backward,
)
