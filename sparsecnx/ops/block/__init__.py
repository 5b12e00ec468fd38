"""The ConvNeXt V2 block as one operator with a small-memory backward."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.choices import Comparison, compare
from sparsecnx.ops.block import cpu, cuda, minkowski, reference
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.checks import (
    autocast,
    check_device,
    check_same_dtype,
    check_sparse,
    check_vector,
    statistics_dtype,
)
from sparsecnx.ops.global_response_norm import segments
from sparsecnx.ops.minkowski import refusal as minkowski_refusal
from sparsecnx.ops.native import refusal_2d
from sparsecnx.ops.triton import implementation as triton_room
from sparsecnx.ops.triton import refusal_2d as triton_refusal_2d
from sparsecnx.tensor import SparseTensor

__all__ = ["BlockParameters", "convnextv2_block", "operator"]


def _compare(x: SparseTensor, p: BlockParameters | None = None, *_: object) -> Comparison:
    """CUDA beside Triton in the depthwise steps, forward and backward; the published models have 7x7 kernels."""
    kernel = (7, 7) if p is None else tuple(p.dwconv_weight.shape[2:])
    steps = ("depthwise_conv_fused", "depthwise_conv", "depthwise_conv_weight_grad")
    return compare(steps, x.device, x.dtype, x.features.shape[1], x.layout.tile, kernel)


operator = Operator(
    "convnextv2_block",
    native=Implementation(native.convnextv2_block, refusal_2d, native.detail),
    triton=triton_room(__name__, "convnextv2_block", triton_refusal_2d, "detail"),
    cuda=Implementation(cuda.convnextv2_block, cuda.refusal, cuda.detail, _compare),
    reference=Implementation(reference.convnextv2_block, always),
    minkowski=Implementation(minkowski.convnextv2_block, minkowski_refusal, by_name=True),
)


def convnextv2_block(
    x: SparseTensor,
    parameters: BlockParameters,
    survival: Tensor | None = None,
    scope: str = "sample",
    eps: float = 1e-6,
    recompute: bool | Literal["auto"] = "auto",
) -> SparseTensor:
    """One ConvNeXt V2 block on visible sites (arXiv 2301.00808, figure 5):

        u = dwconv(x)    v = LN(u)    h = gelu(v W1' + b1)    y = x + survival[n] * (GRN(h) W2' + b2)

    Args:
        x: features `(rows, C)`.
        parameters: see `BlockParameters`; matrices and kernel in the dtype of `x`.
        survival: stochastic-depth scale of each image, `(B,)`, see `draw_survival`; None for 1. A constant: no
            gradient flows to it.
        scope: groups of GRN, `"sample"` or `"batch"`, see `ops.grn`.
        eps: of LayerNorm and GRN.
        recompute: whether backward computes the hidden layer `(rows, 4C)` again rather than keeping it;
            "auto" lets the backend decide by C.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor, or dtypes differ outside autocast.
        ValueError: a shape does not fit, the kernel is even, `scope` or `recompute` is unknown, or devices differ.
    """
    check_sparse(x)
    if recompute not in (True, False, "auto"):
        raise ValueError(f"recompute is {recompute!r}: expected True, False or 'auto'")
    p = BlockParameters(*parameters)
    channels, ndim = x.features.shape[1], x.layout.ndim
    kernel = tuple(p.dwconv_weight.shape[2:])
    if p.dwconv_weight.shape[:2] != (channels, 1) or len(kernel) != ndim:
        raise ValueError(f"dwconv_weight is {tuple(p.dwconv_weight.shape)}: expected ({channels}, 1{', k' * ndim})")
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"dwconv_weight is {tuple(p.dwconv_weight.shape)}: kernel sizes must be odd")
    hidden = p.pwconv1_weight.shape[0]
    for name, expected in (("pwconv1_weight", (hidden, channels)), ("pwconv2_weight", (channels, hidden))):
        if tuple(getattr(p, name).shape) != expected:
            raise ValueError(f"{name} is {tuple(getattr(p, name).shape)}: expected {expected}")
    for name in ("dwconv_bias", "norm_weight", "norm_bias", "pwconv2_bias"):
        check_vector(getattr(p, name), name, channels, x)
    for name in ("pwconv1_bias", "grn_gamma", "grn_beta"):
        check_vector(getattr(p, name), name, hidden, x)
    if survival is not None:
        if tuple(survival.shape) != (x.layout.batch,):
            raise ValueError(f"survival is {tuple(survival.shape)}: expected ({x.layout.batch},)")
        check_device(survival, "survival", x)

    x, matrices = autocast(x, p.dwconv_weight, p.pwconv1_weight, p.pwconv2_weight)
    dtype = statistics_dtype(x.dtype)
    vectors = {name: value.flatten().to(dtype) for name, value in p._asdict().items()}
    vectors |= zip(("dwconv_weight", "pwconv1_weight", "pwconv2_weight"), matrices, strict=True)
    p = BlockParameters(**vectors)
    for name in ("dwconv_weight", "pwconv1_weight", "pwconv2_weight"):
        check_device(getattr(p, name), name, x)
        check_same_dtype(x, name, getattr(p, name))
    if survival is not None:
        survival = survival.detach().to(dtype)
    features = operator(x, p, survival, segments(x.layout, scope), eps, None if recompute == "auto" else recompute)
    return x.with_features(features)
