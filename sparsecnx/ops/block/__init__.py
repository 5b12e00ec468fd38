"""The ConvNeXt V2 block as one operator with a small-memory backward."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import minkowski as minkowski_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.block import cpu, cuda, layers
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.checks import (
    as_statistics,
    autocast,
    check_device,
    check_same_dtype,
    check_sparse,
    check_vector,
)
from sparsecnx.ops.global_response_norm.groups import check_scope
from sparsecnx.tensor import SparseTensor

__all__ = ["BlockParameters", "convnextv2_block", "operator"]

MATRICES = ("dwconv_weight", "pwconv1_weight", "pwconv2_weight")
OPTIONAL = ("dwconv_bias", "norm_weight", "norm_bias", "pwconv1_bias", "pwconv2_bias")

operator = Operator(
    "convnextv2_block",
    cpu=Implementation(cpu.convnextv2_block, cpu_backend.refusal, cpu.detail),
    triton=triton_launch.implementation("sparsecnx.ops.block.triton_block", "convnextv2_block", detail="detail"),
    cuda=Implementation(cuda.convnextv2_block, cuda.refusal, cuda.detail),
    minkowski=Implementation(layers.by_operators, minkowski_backend.refusal),
    reference=Implementation(layers.reference),
)


def convnextv2_block(
    x: SparseTensor,
    parameters: BlockParameters,
    survival: Tensor | None = None,
    scope: str = "sample",
    eps: float = 1e-6,
    recompute: bool | Literal["auto"] = "auto",
    grn_eps: float | None = None,
) -> SparseTensor:
    """Run one ConvNeXt V2 block on visible sites (arXiv 2301.00808, figure 5):

        u = dwconv(x)    v = LN(u)    h = gelu(v W1' + b1)    y = x + survival[n] * (GRN(h) W2' + b2)

    Args:
        x: features `(rows, C)`.
        parameters: see `BlockParameters`; matrices and kernel in the dtype of `x`.
        survival: stochastic-depth scale of each image, `(B,)`, see `draw_survival`; None for 1. A constant: no
            gradient flows to it.
        scope: groups of GRN, `"sample"` or `"batch"`, see `ops.grn`.
        eps: epsilon of LayerNorm, added to the variance.
        recompute: whether backward computes the hidden layer `(rows, 4C)` again rather than keeping it;
            "auto" lets the backend decide by C.
        grn_eps: epsilon of GRN, added to the mean over channels; None for `eps`.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor, or dtypes differ outside autocast.
        ValueError: a shape does not fit, the kernel is even, `scope` or `recompute` is unknown, or devices differ.
    """
    check_sparse(x)
    if recompute not in (True, False, "auto"):
        raise ValueError(f"recompute is {recompute!r}: expected True, False or 'auto'")
    check_scope(scope)
    p = BlockParameters(*parameters)
    channels, hidden = x.features.shape[1], p.pwconv1_weight.shape[0]
    _check_matrices(x, p, channels, hidden)
    for name in OPTIONAL:
        value = getattr(p, name)
        if value is not None:
            check_vector(value, name, hidden if name == "pwconv1_bias" else channels, x)
    check_vector(p.grn_gamma, "grn_gamma", hidden, x)
    check_vector(p.grn_beta, "grn_beta", hidden, x)
    if survival is not None:
        if tuple(survival.shape) != (x.layout.batch,):
            raise ValueError(f"survival is {tuple(survival.shape)}: expected ({x.layout.batch},)")
        check_device(survival, "survival", x)
        survival = survival.detach().to(statistics_dtype(x.dtype))
    return run(
        x, p, survival, scope, eps, eps if grn_eps is None else grn_eps, None if recompute == "auto" else recompute
    )


def run(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    recompute: bool | None,
) -> SparseTensor:
    """Run `convnextv2_block` on arguments that fit, but for the dtypes of the matrices, which autocast may change.

    Args:
        survival: a constant in the dtype of the statistics of `x`, or None.
        recompute: None for "auto".

    Raises:
        TypeError: dtypes differ outside autocast.
    """
    x, (kernel, first, second) = autocast(x, p.dwconv_weight, p.pwconv1_weight, p.pwconv2_weight)
    check_same_dtype(x, "dwconv_weight", kernel)
    check_same_dtype(x, "pwconv1_weight", first)
    check_same_dtype(x, "pwconv2_weight", second)
    p = BlockParameters(
        kernel.contiguous(),
        _vector(p.dwconv_bias, x, kernel.shape[0]),
        _vector(p.norm_weight, x, kernel.shape[0], missing=1.0),
        _vector(p.norm_bias, x, kernel.shape[0]),
        first.contiguous(),
        _vector(p.pwconv1_bias, x, first.shape[0]),
        as_statistics(p.grn_gamma, x),
        as_statistics(p.grn_beta, x),
        second.contiguous(),
        _vector(p.pwconv2_bias, x, kernel.shape[0]),
    )
    return x.with_features(operator(x, p, survival, scope, eps, grn_eps, recompute))


def _vector(value: Tensor | None, x: SparseTensor, channels: int, missing: float = 0.0) -> Tensor:
    if value is None:
        return x.features.new_full((channels,), missing, dtype=statistics_dtype(x.dtype))
    return as_statistics(value, x)


def _check_matrices(x: SparseTensor, p: BlockParameters, channels: int, hidden: int) -> None:
    """Raise ValueError unless the kernel and the matrices fit each other and `x`."""
    ndim, kernel = x.layout.ndim, tuple(p.dwconv_weight.shape)
    if kernel[:2] != (channels, 1) or len(kernel) != 2 + ndim:
        raise ValueError(f"dwconv_weight is {kernel}: expected ({channels}, 1{', k' * ndim})")
    if any(size % 2 == 0 for size in kernel[2:]):
        raise ValueError(f"dwconv_weight is {kernel}: kernel sizes must be odd")
    for name, expected in (("pwconv1_weight", (hidden, channels)), ("pwconv2_weight", (channels, hidden))):
        if tuple(getattr(p, name).shape) != expected:
            raise ValueError(f"{name} is {tuple(getattr(p, name).shape)}: expected {expected}")
    for name in MATRICES:
        check_device(getattr(p, name), name, x)
