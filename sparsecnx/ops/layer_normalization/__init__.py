"""Layer normalization of each site over its channels."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.ops.checks import check_sparse, check_vector, statistics_dtype
from sparsecnx.ops.layer_normalization import cpu, reference
from sparsecnx.ops.minkowski import refusal as minkowski_refusal
from sparsecnx.ops.native import refusal
from sparsecnx.ops.triton import implementation
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "layer_norm",
    native=Implementation(native.layer_norm, refusal),
    triton=implementation(__name__, "layer_norm"),
    reference=Implementation(reference.layer_norm, always),
    # MinkowskiEngine has no such layer: code written for it does this in torch, on the rows.
    minkowski=Implementation(reference.layer_norm, minkowski_refusal, by_name=True),
)


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> SparseTensor:
    """Normalise every row to zero mean and unit (biased) variance over C, then scale and shift.

    Args:
        x: features `(rows, C)`.
        weight, bias: `(C,)`.
        eps: added to the variance.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: a shape does not fit or devices differ.
    """
    check_sparse(x)
    channels = x.features.shape[1]
    check_vector(weight, "weight", channels, x)
    check_vector(bias, "bias", channels, x)
    dtype = statistics_dtype(x.dtype)
    return x.with_features(operator(x, weight.to(dtype), bias.to(dtype), eps))
